"""The traffic plan's changes: one operator at a time, written atomically, with history and an audit line for each.

The type and the reader of the plan are contracts/plan.py. Nothing here talks to TorchServe: the agents carry out what
is written, and would carry it out too if the writer were killed a moment later.
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
from control.errors import AnotherOperator, HomeNotWritable, NoPlan, PlanUnusable

if TYPE_CHECKING:
    from collections.abc import Iterator


class PlanStore:
    """The plan in `home`/plan.json, every revision of it in `home`/history/, every change in `home`/audit.jsonl."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "plan.json"
        self.audit_path = home / "audit.jsonl"

    def exists(self) -> bool:
        """Whether there is a plan."""
        return self.path.exists()

    def read(self) -> traffic_plan.Plan:
        """The plan.

        Raises:
            NoPlan: there is none yet.
            PlanUnusable: it cannot be read.
        """
        try:
            plan = traffic_plan.load(self.path)
            if traffic_plan.schema_of(self.path) > 1:
                return plan
            return replace(plan, previous=self._stable_before(plan))
        except FileNotFoundError as error:
            raise NoPlan(self.path) from error
        except (OSError, traffic_plan.PlanError) as error:
            raise PlanUnusable(self.path, str(error)) from error

    @contextlib.contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """Holds the operators' lock; it ends with this process, however that ends.

        Raises:
            AnotherOperator: somebody else holds it; the text says who, for what and since when.
            HomeNotWritable: there is no place for it.
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
        """Puts `plan` in force as the next revision and returns it; the caller holds the lock.

        Args:
            plan: what shall be true from now on; its revision is replaced.
            what: the change in a word, for the audit line.
            facts: whatever else belongs there.
        """
        before = self.read() if self.exists() else None
        plan = replace(plan, revision=self._last_revision() + 1)
        data = traffic_plan.dump(plan)
        traffic_plan.parse(data)  # nothing is written that gateways and agents would refuse
        if before is not None and not self._history(before).exists():  # its writer was killed before it did
            write_atomically(self._history(before), _as_text(traffic_plan.dump(before)))
            self.note("found in force, without a line here", after=traffic_plan.dump(before))
        # The plan first: every revision in the history was in force.
        write_atomically(self.path, _as_text(data))
        write_atomically(self._history(plan), _as_text(data))
        self.note(what, before=traffic_plan.dump(before) if before else None, after=data, **facts)
        return plan

    def note(self, what: str, **facts: object) -> None:
        """Appends one audit line: who, what, when, and the facts."""
        line = {"time": _now(), "who": operator(), "what": what, **facts}
        self.home.mkdir(parents=True, exist_ok=True)
        with self.audit_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _stable_before(self, plan: traffic_plan.Plan) -> tuple[traffic_plan.Release, ...]:
        """Return the versions that were stable before, by the history: plans of schema 1 do not list them."""
        found: dict[str, traffic_plan.Release] = {}
        for path in sorted((self.home / "history").glob("plan-*.json"), reverse=True):
            with contextlib.suppress(OSError, traffic_plan.PlanError):
                earlier = traffic_plan.load(path)
                if earlier.model == plan.model and earlier.stable.version != plan.stable.version:
                    found.setdefault(earlier.stable.version, earlier.stable)
        return tuple(found.values())[: traffic_plan.MAX_PREVIOUS]

    def _history(self, plan: traffic_plan.Plan) -> Path:
        return self.home / "history" / f"plan-{plan.revision:06d}.json"

    def _last_revision(self) -> int:
        """The highest revision ever written, so that none is used twice even if the plan was broken by hand."""
        names = (path.stem.removeprefix("plan-") for path in (self.home / "history").glob("plan-*.json"))
        revisions = [int(name) for name in names if name.isdigit()]
        with contextlib.suppress(NoPlan, PlanUnusable):
            revisions.append(self.read().revision)
        return max(revisions, default=0)


def first_plan(archive: Path, *, workers: int | None = None) -> traffic_plan.Plan:
    """A plan with the archive's version as stable and nothing else.

    Raises:
        ArchiveError: the archive must not be registered.
    """
    found = inspect_archive(archive)
    release = traffic_plan.Release(found.version, archive.name, found.sha256, workers)
    return traffic_plan.Plan(revision=0, model=found.contract.name, stable=release)


def with_new_bytes(plan: traffic_plan.Plan, archive: Path) -> traffic_plan.Plan:
    """The plan with the archive's present hash wherever it names this file; an equal plan where nothing changed."""
    sha256 = file_sha256(archive)

    def renew(release: Any) -> Any:  # noqa: ANN401 (a release, a canary or none, and the same out)
        return release if release is None or release.archive != archive.name else replace(release, sha256=sha256)

    return replace(
        plan,
        stable=renew(plan.stable),
        canary=renew(plan.canary),
        shadow=renew(plan.shadow),
        retained=tuple(map(renew, plan.retained)),
        previous=tuple(map(renew, plan.previous)),
    )


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file: readers see the old content or the new, even if the machine stops in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes it private; gateway and agent may run as other users.
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
    """Who changes the plan: `GRADSERVE_OPERATOR`, else the user and the machine."""
    return os.environ.get("GRADSERVE_OPERATOR") or f"{getpass.getuser()}@{socket.gethostname()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
