"""The traffic plan in a ConfigMap of Kubernetes: compare-and-set instead of a lock, history in a second ConfigMap."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from contracts import plan as traffic_plan
from control.errors import ClusterUnusable, NoPlan, PlanChanged, PlanUnusable
from control.release.plan_folder import plan_text
from gateway.kubernetes import plan_object
from gateway.kubernetes.api import config_maps
from gateway.kubernetes.errors import Conflict, KubernetesError, ObjectMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.kubernetes.addresses import PlanObject
    from gateway.kubernetes.api import KubernetesApi, Manifest

MOST_REVISIONS = 20
MOST_LINES = 200
# A ConfigMap holds one MiB at most.
# Source: https://kubernetes.io/docs/concepts/configuration/configmap/
MOST_HISTORY_BYTES = 700_000
AUDIT = "audit.jsonl"
_ATTEMPTS = 5


class PlanConfigMap:
    """The plan in the ConfigMap `address`, its history and audit log in the ConfigMap of that name and `-history`.

    The history keeps the last revisions and lines only.
    """

    def __init__(self, api: KubernetesApi, address: PlanObject) -> None:
        self._api = api
        self._address = address
        self._collection = config_maps(address.namespace)
        self._history_name = f"{address.name}-history"
        self._is_locked = False
        self._was_read = False
        self._base: Manifest | None = None

    def exists(self) -> bool:
        """Return True if there is a plan."""
        return self._read_object() is not None

    def read(self) -> traffic_plan.Plans:
        """Return the plans.

        Raises:
            NoPlan: there are none yet.
            PlanUnusable: the ConfigMap holds no plan.
            ClusterUnusable: the API server refuses, or gives no answer.
        """
        found = self._read_object()
        if found is None:
            raise NoPlan(self._address, "`gradserve deploy ARCHIVE.mar --model NAME` writes the first one")
        try:
            return traffic_plan.loads(plan_object.plan_text(found))
        except traffic_plan.PlanError as error:
            history = f"the ConfigMap {self._history_name}"
            raise PlanUnusable(self._address, str(error), history) from error

    @contextmanager
    def lock(self, what: str) -> Iterator[None]:  # noqa: ARG002 (a folder's lock names the command)
        """Refuse the block's writes if the plan is not as the block read it first, or wrote it last."""
        self._is_locked, self._was_read, self._base = True, False, None
        try:
            yield
        finally:
            self._is_locked = False

    def write(self, plans: traffic_plan.Plans) -> None:
        """Put the plans in force; call it only under the lock.

        Raises:
            PlanChanged: another operator has written since the lock's block read the plan.
            ClusterUnusable: the API server refuses, or gives no answer.
        """
        if not self._was_read:
            self._read_object()
        data = {plan_object.KEY: plan_text(plans)}
        base, collection = self._base, self._collection
        with _as_control_errors():
            try:
                if base is None:
                    self._base = self._api.create(collection, self._new(self._address.name, data))
                else:
                    changed = {**base, "data": {**(base.get("data") or {}), **data}}
                    self._base = self._api.replace(collection, changed)
            except Conflict as error:
                raise PlanChanged(self._address) from error

    def is_recorded(self, revision: int) -> bool:
        """Return True if the history has the revision."""
        return _key(revision) in self._read_history()

    def record(self, plans: traffic_plan.Plans) -> None:
        """Add the plans to the history."""

        def add(data: dict[str, str]) -> None:
            data[_key(plans.revision)] = plan_text(plans)

        self._change_history(add)

    def last_recorded(self) -> int:
        """Return the highest revision in the history, 0 without one."""
        return max(map(_revision, filter(_is_revision, self._read_history())), default=0)

    def note(self, line: dict[str, Any]) -> None:
        """Append the line to the audit log."""

        def add(data: dict[str, str]) -> None:
            data[AUDIT] = data.get(AUDIT, "") + json.dumps(line) + "\n"

        self._change_history(add)

    def _read_object(self) -> Manifest | None:
        found = self._get(self._address.name)
        if self._is_locked and not self._was_read:
            # Later reads of the block leave it: a change by another operator must not pass as this one's base.
            self._was_read, self._base = True, found
        return found

    def _read_history(self) -> dict[str, str]:
        found = self._get(self._history_name)
        return dict((found or {}).get("data") or {})

    def _change_history(self, change: Callable[[dict[str, str]], None]) -> None:
        """Change the history; again, if another operator has changed it meanwhile."""
        collection = self._collection
        for _ in range(_ATTEMPTS):
            found = self._get(self._history_name)
            data = dict((found or {}).get("data") or {})
            change(data)
            bound_history(data)
            with _as_control_errors():
                try:
                    if found is None:
                        self._api.create(collection, self._new(self._history_name, data))
                    else:
                        self._api.replace(collection, {**found, "data": data})
                except Conflict:
                    continue
                return
        raise ClusterUnusable(f"other operators changed the ConfigMap {self._history_name} each time it was written")

    def _get(self, name: str) -> Manifest | None:
        with _as_control_errors():
            try:
                return self._api.get(self._collection, name)
            except ObjectMissing:
                return None

    def _new(self, name: str, data: dict[str, str]) -> Manifest:
        labels = {"app.kubernetes.io/managed-by": "gradserve"}
        metadata = {"name": name, "namespace": self._address.namespace, "labels": labels}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def bound_history(data: dict[str, str]) -> None:
    """Remove the oldest revisions and audit lines above `MOST_REVISIONS`, `MOST_LINES` and `MOST_HISTORY_BYTES`."""
    revisions = sorted(filter(_is_revision, data), key=_revision)
    lines = data.get(AUDIT, "").splitlines(keepends=True)[-MOST_LINES:]
    for key in revisions[:-MOST_REVISIONS]:
        del data[key]
    revisions = revisions[-MOST_REVISIONS:]
    # JSON in JSON is longer than its text, by the escaped quotation marks; the limit leaves room for them.
    spare = MOST_HISTORY_BYTES - sum(len(data[key].encode()) for key in revisions)
    while revisions[1:] and spare < 0:
        spare += len(data.pop(revisions.pop(0)).encode())
    sizes = [len(line.encode()) for line in lines]
    while lines and sum(sizes) > spare:
        lines.pop(0)
        sizes.pop(0)
    data[AUDIT] = "".join(lines)


def _key(revision: int) -> str:
    return f"plan-{revision:06d}.json"


def _is_revision(key: str) -> bool:
    return key.startswith("plan-") and key.endswith(".json") and key[5:-5].isdigit()


def _revision(key: str) -> int:
    return int(key[5:-5])


@contextmanager
def _as_control_errors() -> Iterator[None]:
    try:
        yield
    except KubernetesError as error:
        raise ClusterUnusable(str(error)) from error
