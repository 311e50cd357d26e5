"""Addresses of objects in Kubernetes, as settings write them: `kubernetes:NAMESPACE/NAME`, with `:PORT` for a Service.

Without a namespace an address means the pod's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PREFIX = "kubernetes:"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The folder that Kubernetes mounts in a pod: the namespace's name, and what a client of the API needs."""
# Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?"
_PLAN = re.compile(rf"{PREFIX}((?P<namespace>{_LABEL})/)?(?P<name>{_SUBDOMAIN})")
_SERVICE = re.compile(rf"{PREFIX}((?P<namespace>{_LABEL})/)?(?P<name>{_LABEL}):(?P<port>[1-9][0-9]{{0,4}})")


@dataclass(frozen=True)
class PlanObject:
    """The address of a plan: a ConfigMap in a namespace, written `kubernetes:NAMESPACE/NAME`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.namespace}/{self.name}"


@dataclass(frozen=True)
class ServiceAddress:
    """The endpoints of a Service at one port, written `kubernetes:NAMESPACE/SERVICE:PORT`."""

    namespace: str
    service: str
    port: int

    def __str__(self) -> str:
        return f"{PREFIX}{self.namespace}/{self.service}:{self.port}"


def is_address(text: str) -> bool:
    """Return True if `text` is written like an address of an object in Kubernetes."""
    return text.startswith(PREFIX)


def parse_plan(text: str) -> PlanObject | None:
    """Return the address of the plan that `text` writes; None for the path of a file.

    Raises:
        ValueError: the text begins with `kubernetes:` and is no address, or has no namespace outside of a pod.
    """
    if not is_address(text):
        return None
    found = _parse(_PLAN, text, "names no plan: write like kubernetes:NAMESPACE/NAME")
    return PlanObject(_namespace(found, "kubernetes:NAMESPACE/NAME"), found["name"])


def parse_service(text: str) -> ServiceAddress:
    """Return the address of the Service that `text` writes.

    Raises:
        ValueError: the text is no such address, or has no namespace outside of a pod.
    """
    found = _parse(_SERVICE, text, "names no Service: write like kubernetes:NAMESPACE/SERVICE:9100")
    return ServiceAddress(_namespace(found, "kubernetes:NAMESPACE/SERVICE:PORT"), found["name"], int(found["port"]))


def pod_namespace() -> str | None:
    """Return the namespace of the pod in which this runs; None if it runs in none."""
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _parse(pattern: re.Pattern[str], text: str, problem: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} {problem}")
    return found


def _namespace(found: re.Match[str], form: str) -> str:
    namespace = found["namespace"] or pod_namespace()
    if namespace is None:
        raise ValueError(f"{found[0]} has no namespace, and this runs in no pod: write {form}")
    return namespace
