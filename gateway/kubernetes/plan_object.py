"""The traffic plan as a ConfigMap: a reader that follows it by watch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from contracts import plan as traffic_plan
from contracts.watched_file import WatchedFile
from gateway.kubernetes.addresses import parse_plan
from gateway.kubernetes.api import config_maps, connect, named
from gateway.kubernetes.watch import follow

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.kubernetes.addresses import PlanObject
    from gateway.kubernetes.api import KubernetesApi, Manifest

KEY = "plan.json"
"""The key under which the ConfigMap holds the plan."""


def watch_plan(where: Path, *, missing: str) -> WatchedFile[traffic_plan.Plans] | WatchedPlan:
    """Return a reader of the plan at `where`: a file, or a ConfigMap written `kubernetes:NAMESPACE/NAME`.

    Raises:
        ValueError: `where` is an address that cannot be used.
        NotInCluster: it names a ConfigMap, and no API server is known.
    """
    address = parse_plan(str(where))
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
        address = self._address
        follow(self._api, config_maps(address.namespace), named(address.name), self._report_objects, self._stop)

    def _report_objects(self, objects: dict[str, Manifest] | None, error: str | None) -> None:
        if objects is None:
            self._report(None, f"the plan {self._address} cannot be followed: {error}")
        else:
            manifest = objects.get(self._address.name)
            self._report(manifest, f"there is no ConfigMap {self._address}" if manifest is None else None)

    def _report(self, manifest: Manifest | None, error: str | None) -> None:
        text = None if manifest is None else plan_text(manifest)
        with self._changed:
            if text is None and self._found is not None:
                text = self._found[0]  # an error must not hide a plan that was not taken over yet
            self._found = text, error
