"""The traffic plan as a ConfigMap: its address, and a reader that follows it by watch."""

from __future__ import annotations

import random
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts import plan as traffic_plan
from contracts.watched_file import WatchedFile
from gateway.kubernetes import api as kubernetes
from gateway.kubernetes.api import config_maps, connect
from gateway.kubernetes.errors import Expired, KubernetesError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.kubernetes.api import KubernetesApi, Manifest

PREFIX = "kubernetes:"
KEY = "plan.json"
"""The key under which the ConfigMap holds the plan."""
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.2, 10.0
_NAME = r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?"
_ADDRESS = re.compile(rf"{PREFIX}((?P<namespace>{_NAME})/)?(?P<name>{_NAME})")


@dataclass(frozen=True)
class PlanObject:
    """The address of a plan: a ConfigMap in a namespace, written `kubernetes:NAMESPACE/NAME`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.namespace}/{self.name}"

    @property
    def collection(self) -> str:
        """The collection that the ConfigMap is in."""
        return config_maps(self.namespace)


def parse_address(text: str) -> PlanObject | None:
    """Return the address that `text` writes; None for the path of a file. Without a namespace it is the pod's own.

    Raises:
        ValueError: the text begins with `kubernetes:` and is no address, or has no namespace outside of a pod.
    """
    if not text.startswith(PREFIX):
        return None
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} names no plan: write like kubernetes:NAMESPACE/NAME")
    namespace = found["namespace"]
    if namespace is None:
        try:
            namespace = (kubernetes.SERVICE_ACCOUNT / "namespace").read_text(encoding="ascii").strip()
        except OSError as error:
            raise ValueError(
                f"{text} has no namespace, and this runs in no pod: write kubernetes:NAMESPACE/NAME"
            ) from error
    return PlanObject(namespace, found["name"])


def watch_plan(where: Path, *, missing: str) -> WatchedFile[traffic_plan.Plans] | WatchedPlan:
    """Return a reader of the plan at `where`: a file, or a ConfigMap written `kubernetes:NAMESPACE/NAME`.

    Raises:
        ValueError: `where` is an address that cannot be used.
        NotInCluster: it names a ConfigMap, and no API server is known.
    """
    address = parse_address(str(where))
    if address is None:
        return WatchedFile(where, traffic_plan.load, missing=missing)
    return WatchedPlan(connect(), address)


def plan_text(manifest: Manifest) -> str:
    """Return the plan's text in the ConfigMap; an empty text if it has none."""
    data = manifest.get("data")
    return str(data.get(KEY, "")) if isinstance(data, dict) else ""


class WatchedPlan:
    """The plan in a ConfigMap, with the interface of `WatchedFile`. A thread follows the ConfigMap from `start` on.

    While the API server is away, or the ConfigMap is gone or broken, the last good plan stays.

    Attributes:
        content: the last plan that could be used; None if there was none yet.
        error: why the plan as it is now cannot be used or followed; None when it can.
    """

    def __init__(self, api: KubernetesApi, address: PlanObject) -> None:
        self.content: traffic_plan.Plans | None = None
        self.error: str | None = f"the plan {address} has not been read yet"
        self._api = api
        self._address = address
        self._changed = threading.Lock()
        self._found: tuple[str | None, str | None] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refresh(self) -> bool:
        """Take over what the thread has found since the last call; return True if `content` or `error` has changed."""
        if self._thread is None:
            # Started here and not by the constructor: a thread does not outlive a fork.
            self._thread = threading.Thread(target=self._follow, name="plan watch", daemon=True)
            self._thread.start()
        with self._changed:
            found, self._found = self._found, None
        if found is None:
            return False
        text, error = found
        before = self.content, self.error
        if text is not None:
            try:
                self.content = traffic_plan.loads(text)
            except traffic_plan.PlanError as problem:
                error = str(problem)
        self.error = error
        return (self.content, self.error) != before

    def close(self) -> None:
        """End the thread once its watch ends, at the latest after half a minute."""
        self._stop.set()
        self._api.close()

    def _follow(self) -> None:
        follow(self._api, self._address, self._report, self._stop)

    def _report(self, manifest: Manifest | None, error: str | None) -> None:
        text = None if manifest is None else plan_text(manifest)
        with self._changed:
            if text is None and self._found is not None:
                text = self._found[0]  # an error must not hide a plan that was not taken over yet
            self._found = text, error


def follow(
    api: KubernetesApi,
    address: PlanObject,
    report: Callable[[Manifest | None, str | None], None],
    stop: threading.Event,
) -> None:
    """Call `report` with the ConfigMap whenever it has changed, or with the reason why it cannot be followed.

    A watch that ends goes on from the last version that was seen. After an error, with back-off, the ConfigMap is
    listed again: that shows at once what changed meanwhile. Return when `stop` is set.
    """
    version: str | None = None
    delay_s = BACKOFF_FIRST_S
    while not stop.is_set():
        try:
            if version is None:
                found, version = api.list(address.collection, address.name)
                _report_object(address, found[0] if found else None, report)
            for event in api.watch(address.collection, address.name, version):
                delay_s = BACKOFF_FIRST_S
                version = event.manifest["metadata"]["resourceVersion"]
                if event.kind != "BOOKMARK":
                    _report_object(address, None if event.kind == "DELETED" else event.manifest, report)
        except Expired:
            version = None
        except KubernetesError as error:
            report(None, f"the plan {address} cannot be followed: {error}")
            version = None
        except Exception as error:  # noqa: BLE001 (the thread must not end: nothing would follow the plan any more)
            report(None, f"the plan {address} cannot be followed ({type(error).__name__})")
            version = None
        else:
            delay_s = BACKOFF_FIRST_S
        stop.wait(delay_s * random.uniform(0.5, 1))  # noqa: S311 (not for secrets)
        delay_s = BACKOFF_FIRST_S if version is not None else min(BACKOFF_MOST_S, 2 * delay_s)


def _report_object(
    address: PlanObject, manifest: Manifest | None, report: Callable[[Manifest | None, str | None], None]
) -> None:
    report(manifest, f"there is no ConfigMap {address}" if manifest is None else None)
