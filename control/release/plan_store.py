"""The store of the traffic plan, in a folder or in a ConfigMap of Kubernetes.

contracts/plan.py has the plan's type and reader. Nothing here talks to TorchServe: the agents carry out the written
plan, even if the process that wrote it is killed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from contracts import plan as traffic_plan
from control.archive import file_sha256, inspect_archive
from control.errors import BadSetting, ClusterUnusable, ImpossibleMove, ModelNotPlanned, NoPlan, PlanUnusable
from control.release.plan_config_map import PlanConfigMap
from control.release.plan_folder import PlanFolder, now, operator
from gateway.kubernetes.addresses import parse_plan
from gateway.kubernetes.api import connect
from gateway.kubernetes.errors import NotInCluster

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path


class PlanBackend(Protocol):
    """A place that keeps the plans of all models, their history and the audit log."""

    def exists(self) -> bool:
        """Return True if there is a plan."""

    def read(self) -> traffic_plan.Plans:
        """Return the plans; raise NoPlan or PlanUnusable."""

    def lock(self, what: str) -> AbstractContextManager[None]:
        """Return a block in which no other operator's change is overwritten."""

    def write(self, plans: traffic_plan.Plans) -> None:
        """Put the plans in force."""

    def is_recorded(self, revision: int) -> bool:
        """Return True if the history has the revision."""

    def record(self, plans: traffic_plan.Plans) -> None:
        """Add the plans to the history."""

    def last_recorded(self) -> int:
        """Return the highest revision in the history, 0 without one."""

    def note(self, line: dict[str, Any]) -> None:
        """Append the line to the audit log."""


class PlanStore:
    """The plans of all models, kept by `backend`: by default the folder `home`, which also has the operators' files.

    `read` and `write` are about the plan of one model: `model`, or the default model if that is None.
    """

    def __init__(self, home: Path, model: str | None = None, *, backend: PlanBackend | None = None) -> None:
        self.home = home
        self._model = model
        folder = PlanFolder(home)
        self._backend: PlanBackend = backend or folder
        self.path = folder.path
        self.audit_path = folder.audit_path

    def exists(self) -> bool:
        """Return True if there is a plan."""
        return self._backend.exists()

    def read(self) -> traffic_plan.Plan:
        """Return the model's plan.

        Raises:
            NoPlan: there is none yet.
            ModelNotPlanned: the plan serves other models.
            PlanUnusable: they cannot be read, or are no plan.
        """
        plans = self.read_all()
        plan = plans.plan(self._model)
        if plan is None:
            raise ModelNotPlanned(self._model or plans.default, plans.names())
        return plan

    def read_all(self) -> traffic_plan.Plans:
        """Return the plans of all models.

        Raises:
            NoPlan: there are none yet.
            PlanUnusable: they cannot be read, or are no plan.
        """
        return self._backend.read()

    def serves_model(self) -> bool:
        """Return True if there is a plan of the model."""
        return self.exists() and self.read_all().plan(self._model) is not None

    def lock(self, what: str) -> AbstractContextManager[None]:
        """Let no other operator's change be overwritten while the block runs.

        In a folder another operator is refused meanwhile. In a ConfigMap a write of this block is refused if another
        operator has written since the block began.

        Raises:
            AnotherOperator: another process holds the folder's lock; the text names its operator, command and start.
            HomeNotWritable: the folder cannot be written to.
        """
        return self._backend.lock(what)

    def write(self, plan: traffic_plan.Plan, what: str, **facts: object) -> traffic_plan.Plan:
        """Write `plan` into the next revision and return it; call it only under the lock.

        Args:
            plan: the new plan of its model; the plans of other models stay. Its revision is replaced.
            what: the name of the change, for the audit line.
            facts: more fields of the audit line.
        """
        first = traffic_plan.Plans(0, plan.model, (plan,))
        plans = self.read_all().with_plan(plan) if self.exists() else first
        revision = self.write_all(plans, what, **facts).revision
        return replace(plan, revision=revision)

    def write_all(self, plans: traffic_plan.Plans, what: str, **facts: object) -> traffic_plan.Plans:
        """Write the plans of all models as the next revision and return them; call it only under the lock.

        Raises:
            PlanChanged: another operator has written since the lock's block began; nothing was written.
        """
        before = self.read_all() if self.exists() else None
        plans = plans.with_revision(self._last_revision() + 1)
        data = traffic_plan.dump(plans)
        traffic_plan.parse(data)  # refuse a plan that gateways and agents would refuse
        if before is not None and not self._backend.is_recorded(before.revision):
            # Its writer was killed before it wrote the history.
            self._backend.record(before)
            self.note("found in force without an audit line", after=traffic_plan.dump(before))
        # The plan first: every revision in the history was in force.
        self._backend.write(plans)
        self._backend.record(plans)
        self.note(what, before=traffic_plan.dump(before) if before else None, after=data, **facts)
        return plans

    def remove_model(self, name: str, what: str) -> traffic_plan.Plans:
        """Remove a model's plan; call it only under the lock.

        Raises:
            ModelNotPlanned: there is no plan of it.
            ImpossibleMove: it is the default model.
        """
        plans = self.read_all()
        if plans.plan(name) is None:
            raise ModelNotPlanned(name, plans.names())
        if name == plans.default:
            raise ImpossibleMove(f"{name} is the default model: make another one the default first (models default)")
        return self.write_all(replace(plans, models=tuple(each for each in plans.models if each.model != name)), what)

    def set_default(self, name: str) -> traffic_plan.Plans:
        """Make `name` the model of the calls that name none; call it only under the lock.

        Raises:
            ModelNotPlanned: there is no plan of it.
        """
        plans = self.read_all()
        if plans.plan(name) is None:
            raise ModelNotPlanned(name, plans.names())
        return self.write_all(replace(plans, default=name), f"default model {name}")

    def note(self, what: str, **facts: object) -> None:
        """Append one line to the audit log: time, operator, `what` and `facts`."""
        self._backend.note({"time": now(), "who": operator(), "what": what, **facts})

    def _last_revision(self) -> int:
        """Return the highest revision in the history and the plan, so that no revision is used twice."""
        revisions = [self._backend.last_recorded()]
        with contextlib.suppress(NoPlan, PlanUnusable):
            revisions.append(self.read_all().revision)
        return max(revisions)


def is_in_cluster() -> bool:
    """Return True if `GRADSERVE_PLAN` names a plan in Kubernetes."""
    return bool(os.environ.get("GRADSERVE_PLAN"))


def open_store(home: Path, model: str | None = None) -> PlanStore:
    """Return the operators' store: the ConfigMap `GRADSERVE_PLAN` (kubernetes:NAMESPACE/NAME), else the folder `home`.

    Raises:
        BadSetting: `GRADSERVE_PLAN` names no ConfigMap.
        ClusterUnusable: no Kubernetes API is known.
    """
    where = os.environ.get("GRADSERVE_PLAN")
    if not where:
        return PlanStore(home, model)
    try:
        address = parse_plan(where)
        if address is None:
            raise BadSetting(
                [f"GRADSERVE_PLAN = {where!r}: write kubernetes:NAMESPACE/NAME; GRADSERVE_HOME names a folder"]
            )
        return PlanStore(home, model, backend=PlanConfigMap(connect(), address))
    except ValueError as error:
        raise BadSetting([f"GRADSERVE_PLAN: {error}"]) from error
    except NotInCluster as error:
        raise ClusterUnusable(str(error)) from error


def first_plan(archive: Path, *, workers: int | None = None) -> traffic_plan.Plan:
    """Return a plan with the archive's version as its only one, the stable version.

    Raises:
        ArchiveError: the archive must not be registered.
    """
    found = inspect_archive(archive)
    release = traffic_plan.Release(found.version, archive.name, found.sha256, workers)
    return traffic_plan.Plan(revision=0, model=found.contract.name, stable=release)


def with_current_hash(plans: traffic_plan.Plans, archive: Path) -> traffic_plan.Plans:
    """Return the plans with the archive's current hash wherever a plan names this file."""
    sha256 = file_sha256(archive)

    def renew(release: Any) -> Any:  # noqa: ANN401 (takes a release, a canary or None and returns the same type)
        return release if release is None or release.archive != archive.name else replace(release, sha256=sha256)

    renewed = (
        replace(
            plan,
            stable=renew(plan.stable),
            canary=renew(plan.canary),
            shadow=renew(plan.shadow),
            retained=tuple(map(renew, plan.retained)),
            previous=tuple(map(renew, plan.previous)),
        )
        for plan in plans.models
    )
    return replace(plans, models=tuple(renewed))
