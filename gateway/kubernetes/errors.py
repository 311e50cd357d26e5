"""The errors of the Kubernetes client.

KubernetesError
├── NotInCluster     no API server is known: neither a pod's variables nor GRADSERVE_KUBERNETES_API
├── NoAnswer         the API server gives no answer
└── ApiRefused       the API server refused a call
    ├── ObjectMissing    the object does not exist (404)
    ├── Conflict         the object exists already, or has another resourceVersion (409)
    └── Expired          the resourceVersion of a watch is too old (410)
"""

from __future__ import annotations


class KubernetesError(Exception):
    """The base of the errors here."""


class NotInCluster(KubernetesError):
    """No address of an API server is known."""

    def __init__(self) -> None:
        super().__init__(
            "no Kubernetes API is known: this runs in no pod (KUBERNETES_SERVICE_HOST is not set); set "
            "GRADSERVE_KUBERNETES_API to the address of `kubectl proxy`, like http://127.0.0.1:8001"
        )


class NoAnswer(KubernetesError):
    """The API server at `url` gives no answer; `reason` is the kind of failure."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"the Kubernetes API at {url} gives no answer ({reason})")


class ApiRefused(KubernetesError):
    """The API server answered `status` and `message` to `what`, a method and a path."""

    def __init__(self, what: str, status: int, message: str) -> None:
        remedy = ": give the pod's service account the right to do this" if status in {401, 403} else ""
        super().__init__(f"the Kubernetes API answered {status} to {what} ({message or 'no reason given'}){remedy}")
        self.status = status


class ObjectMissing(ApiRefused):
    """The object does not exist."""


class Conflict(ApiRefused):
    """The object exists already, or was changed since it was read."""


class Expired(ApiRefused):
    """The server no longer knows the changes since the resourceVersion that was asked for: list again."""
