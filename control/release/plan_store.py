"""The store of the traffic plan: a lock for operators, atomic writes, a history and an audit log.

contracts/plan.py has the plan's type and reader. Nothing here talks to TorchServe: the agents carry out the written
plan, even if the process that wrote it is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import socket
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts import plan as traffic_plan
from control.archive import file_sha256, inspect_archive
from control.errors import AnotherOperator, HomeNotWritable, ImpossibleMove, ModelNotPlanned, NoPlan, PlanUnusable

if TYPE_CHECKING:
    from collections.abc import Iterator


class PlanStore:
    """The plan in `home`/plan.json, its revisions in `home`/history/, and its changes in `home`/audit.jsonl.

    `read` and `write` are about the plan of one model: `model`, or the default model if that is None.
    """

    def __init__(self, home: Path, model: str | None = None) -> None:
        self.home = home
        self._model = model
        self.path = home / "plan.json"
        self.audit_path = home / "audit.jsonl"

    def exists(self) -> bool:
        """Return True if there is a plan."""
        return self.path.exists()

    def read(self) -> traffic_plan.Plan:
        """Return the model's plan.

        Raises:
            NoPlan: there is none yet.
            ModelNotPlanned: the plan serves other models.
            PlanUnusable: the file cannot be read or is no plan.
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
            PlanUnusable: the file cannot be read or is no plan.
        """
        try:
            plans = traffic_plan.load(self.path)
            if traffic_plan.schema_of(self.path) > 1:
                return plans
            (plan,) = plans.models
            return plans.with_plan(replace(plan, previous=self._stable_before(plan)))
        except FileNotFoundError as error:
            raise NoPlan(self.path) from error
        except (OSError, traffic_plan.PlanError) as error:
            raise PlanUnusable(self.path, str(error)) from error

    def serves_model(self) -> bool:
        """Return True if there is a plan of the model."""
        return self.exists() and self.read_all().plan(self._model) is not None

    @contextlib.contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """Hold the operators' lock while the block runs; the kernel frees it if this process is killed.

        Raises:
            AnotherOperator: another process holds the lock; the text names its operator, command and start.
            HomeNotWritable: the lock file cannot be written.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            lock = (self.home / "plan.lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise HomeNotWritable(self.home, error.strerror or str(error)) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise AnotherOperator(file.read().strip()) from error
            file.truncate(0)
            file.write(f"{operator()} ({what}, pid {os.getpid()}, since {_now()})")
            file.flush()
            yield

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
        """Write the plans of all models as the next revision and return them; call it only under the lock."""
        before = self.read_all() if self.exists() else None
        plans = plans.with_revision(self._last_revision() + 1)
        data = traffic_plan.dump(plans)
        traffic_plan.parse(data)  # refuse a plan that gateways and agents would refuse
        if (
            before is not None and not self._history(before.revision).exists()
        ):  # its writer was killed before it wrote the history
            write_atomically(self._history(before.revision), _as_text(traffic_plan.dump(before)))
            self.note("found in force without an audit line", after=traffic_plan.dump(before))
        # The plan first: every revision in the history was in force.
        write_atomically(self.path, _as_text(data))
        write_atomically(self._history(plans.revision), _as_text(data))
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
        line = {"time": _now(), "who": operator(), "what": what, **facts}
        self.home.mkdir(parents=True, exist_ok=True)
        with self.audit_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _stable_before(self, plan: traffic_plan.Plan) -> tuple[traffic_plan.Release, ...]:
        """Return the previous stable versions from the history, because a plan of schema 1 does not list them."""
        found: dict[str, traffic_plan.Release] = {}
        for path in sorted((self.home / "history").glob("plan-*.json"), reverse=True):
            with contextlib.suppress(OSError, traffic_plan.PlanError):
                earlier = traffic_plan.load(path).plan(plan.model)
                if earlier is not None and earlier.stable.version != plan.stable.version:
                    found.setdefault(earlier.stable.version, earlier.stable)
        return tuple(found.values())[: traffic_plan.MAX_PREVIOUS]

    def _history(self, revision: int) -> Path:
        return self.home / "history" / f"plan-{revision:06d}.json"

    def _last_revision(self) -> int:
        """Return the highest revision in the history and the plan, so that no revision is used twice."""
        names = (path.stem.removeprefix("plan-") for path in (self.home / "history").glob("plan-*.json"))
        revisions = [int(name) for name in names if name.isdigit()]
        with contextlib.suppress(NoPlan, PlanUnusable):
            revisions.append(self.read_all().revision)
        return max(revisions, default=0)


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


def write_atomically(path: Path, text: str) -> None:
    """Replace the file: readers see the old or the new content, even after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; gateway and agent may run as other users.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _as_text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def operator() -> str:
    """Return the name of the operator: `GRADSERVE_OPERATOR`, else user@machine."""
    return os.environ.get("GRADSERVE_OPERATOR") or f"{getpass.getuser()}@{socket.gethostname()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
