"""A client of the Kubernetes API by httpx: get, create, replace, list and watch.

In a pod it uses the service account: the token, which Kubernetes renews, is read again for each call. Elsewhere
`GRADSERVE_KUBERNETES_API` names an API server that needs no token, such as `kubectl proxy`.

Source: https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import json
import os
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx

from gateway.kubernetes import addresses
from gateway.kubernetes.errors import ApiRefused, Conflict, Expired, NoAnswer, NotInCluster, ObjectMissing

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

TIMEOUT_S = 5.0
# A watch ends after this long and is asked for again, so that a dead connection is noticed soon after.
WATCH_S = 30
_WATCH_SILENT_S = WATCH_S + 5.0
_REFUSALS = {404: ObjectMissing, 409: Conflict, 410: Expired}

Manifest: TypeAlias = dict[str, Any]
"""An object as the API writes it: `metadata`, and fields of its kind."""
Selector: TypeAlias = dict[str, str]
"""The query parameter that selects objects of a collection."""


@dataclass(frozen=True)
class Event:
    """A change that a watch reports: `kind` is ADDED, MODIFIED, DELETED or BOOKMARK."""

    kind: str
    manifest: Manifest


class ServiceAccountToken(httpx.Auth):
    """The token in the file `path`, read for each call."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request with the token; without a readable file, with none."""
        try:
            request.headers["authorization"] = f"Bearer {self._path.read_text(encoding='ascii').strip()}"
        except OSError:
            request.headers.pop("authorization", None)
        yield request


class KubernetesApi:
    """The API server at `url`. A collection is a path such as `config_maps("default")`. Tests pass the transport in."""

    def __init__(
        self,
        url: str,
        *,
        auth: httpx.Auth | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self._url, auth=auth, verify=verify, transport=transport, timeout=TIMEOUT_S, trust_env=False
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, collection: str, name: str) -> Manifest:
        """Return the object.

        Raises:
            ObjectMissing: it does not exist.
            KubernetesError: the server refuses, or gives no answer.
        """
        return self._call("GET", f"{collection}/{name}")

    def create(self, collection: str, manifest: Manifest) -> Manifest:
        """Create the object and return it as the server keeps it.

        Raises:
            Conflict: it exists already.
            KubernetesError: the server refuses, or gives no answer.
        """
        return self._call("POST", collection, manifest)

    def replace(self, collection: str, manifest: Manifest) -> Manifest:
        """Replace the object, if it still has the manifest's `resourceVersion`, and return it as the server keeps it.

        Raises:
            Conflict: it was changed since it was read.
            ObjectMissing: it does not exist.
            KubernetesError: the server refuses, or gives no answer.
        """
        return self._call("PUT", f"{collection}/{manifest['metadata']['name']}", manifest)

    def list(self, collection: str, selector: Selector) -> tuple[list[Manifest], str]:
        """Return the selected objects and the `resourceVersion` from which a watch goes on.

        Raises:
            KubernetesError: the server refuses, or gives no answer.
        """
        found = self._call("GET", collection, params=selector)
        return found.get("items") or [], found["metadata"]["resourceVersion"]

    def watch(self, collection: str, selector: Selector, version: str) -> Iterator[Event]:
        """Yield the changes of the selected objects since `version`, until the server ends the watch.

        Raises:
            Expired: `version` is too old: list again.
            KubernetesError: the server refuses, or the connection breaks.
        """
        what = f"watch {collection}"
        params = {
            **selector,
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        timeout = httpx.Timeout(TIMEOUT_S, read=_WATCH_SILENT_S)
        with (
            self._translate_errors(),
            self._client.stream("GET", collection, params=params, timeout=timeout) as response,
        ):
            if response.is_error:
                response.read()
                raise _refusal(what, response)
            for line in response.iter_lines():
                event = _parse_event(what, line)
                if event is not None:
                    yield event

    def _call(
        self, method: str, path: str, manifest: Manifest | None = None, *, params: dict[str, str] | None = None
    ) -> Manifest:
        with self._translate_errors():
            response = self._client.request(method, path, json=manifest, params=params)
        if response.is_error:
            raise _refusal(f"{method} {path}", response)
        return _read_object(f"{method} {path}", response)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise NoAnswer(self._url, type(error).__name__) from error


def connect() -> KubernetesApi:
    """Return the API server that `GRADSERVE_KUBERNETES_API` names, else that of the pod's cluster.

    Raises:
        NotInCluster: there is neither.
    """
    if url := os.environ.get("GRADSERVE_KUBERNETES_API"):
        return KubernetesApi(url)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    authority = addresses.SERVICE_ACCOUNT / "ca.crt"
    if not host or not authority.is_file():
        raise NotInCluster
    address = f"[{host}]" if ":" in host else host
    token = ServiceAccountToken(addresses.SERVICE_ACCOUNT / "token")
    return KubernetesApi(f"https://{address}:{port}", auth=token, verify=ssl.create_default_context(cafile=authority))


def config_maps(namespace: str) -> str:
    """Return the collection of the namespace's ConfigMaps."""
    return f"/api/v1/namespaces/{namespace}/configmaps"


def endpoint_slices(namespace: str) -> str:
    """Return the collection of the namespace's EndpointSlices."""
    return f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"


def named(name: str) -> Selector:
    """Return the selector of the object called `name`."""
    return {"fieldSelector": f"metadata.name={name}"}


def of_service(service: str) -> Selector:
    """Return the selector of the EndpointSlices of a Service."""
    return {"labelSelector": f"kubernetes.io/service-name={service}"}


def _refusal(what: str, response: httpx.Response) -> ApiRefused:
    try:
        message = str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = ""
    return _REFUSALS.get(response.status_code, ApiRefused)(what, response.status_code, message)


def _read_object(what: str, response: httpx.Response) -> Manifest:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("metadata"), dict):
        raise ApiRefused(what, response.status_code, "the answer is no object of Kubernetes")
    return found


def _parse_event(what: str, line: str) -> Event | None:
    """Return the event in a line of a watch; None for an empty line."""
    if not line.strip():
        return None
    try:
        data = json.loads(line)
        kind, manifest = data["type"], data["object"]
        if kind == "ERROR":
            code = int(manifest["code"])
            raise _REFUSALS.get(code, ApiRefused)(what, code, str(manifest.get("message", "")))
        manifest["metadata"]["resourceVersion"]
    except (ValueError, KeyError, TypeError) as error:
        raise ApiRefused(what, 200, "the answer is no event of a watch") from error
    return Event(kind, manifest)
