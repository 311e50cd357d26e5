"""The traffic plan in a folder: a lock for operators, atomic writes, a history and an audit log."""

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
from control.errors import AnotherOperator, HomeNotWritable, NoPlan, PlanUnusable

if TYPE_CHECKING:
    from collections.abc import Iterator


class PlanFolder:
    """The plan in `home`/plan.json, its revisions in `home`/history/, and its changes in `home`/audit.jsonl."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.path = home / "plan.json"
        self.audit_path = home / "audit.jsonl"

    def exists(self) -> bool:
        """Return True if there is a plan."""
        return self.path.exists()

    def read(self) -> traffic_plan.Plans:
        """Return the plans.

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
            raise PlanUnusable(self.path, str(error), f"{self._home / 'history'}") from error

    @contextlib.contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """Hold the operators' lock while the block runs; the kernel frees it if this process is killed.

        Raises:
            AnotherOperator: another process holds the lock; the text names its operator, command and start.
            HomeNotWritable: the lock file cannot be written.
        """
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            lock = (self._home / "plan.lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise HomeNotWritable(self._home, error.strerror or str(error)) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise AnotherOperator(file.read().strip()) from error
            file.truncate(0)
            file.write(f"{operator()} ({what}, pid {os.getpid()}, since {now()})")
            file.flush()
            yield

    def write(self, plans: traffic_plan.Plans) -> None:
        """Put the plans in force."""
        write_atomically(self.path, plan_text(plans))

    def is_recorded(self, revision: int) -> bool:
        """Return True if the history has the revision."""
        return self._history(revision).exists()

    def record(self, plans: traffic_plan.Plans) -> None:
        """Add the plans to the history."""
        write_atomically(self._history(plans.revision), plan_text(plans))

    def last_recorded(self) -> int:
        """Return the highest revision in the history, 0 without one."""
        names = (path.stem.removeprefix("plan-") for path in (self._home / "history").glob("plan-*.json"))
        return max((int(name) for name in names if name.isdigit()), default=0)

    def note(self, line: dict[str, Any]) -> None:
        """Append the line to the audit log."""
        self._home.mkdir(parents=True, exist_ok=True)
        with self.audit_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _stable_before(self, plan: traffic_plan.Plan) -> tuple[traffic_plan.Release, ...]:
        """Return the previous stable versions from the history, because a plan of schema 1 does not list them."""
        found: dict[str, traffic_plan.Release] = {}
        for path in sorted((self._home / "history").glob("plan-*.json"), reverse=True):
            with contextlib.suppress(OSError, traffic_plan.PlanError):
                earlier = traffic_plan.load(path).plan(plan.model)
                if earlier is not None and earlier.stable.version != plan.stable.version:
                    found.setdefault(earlier.stable.version, earlier.stable)
        return tuple(found.values())[: traffic_plan.MAX_PREVIOUS]

    def _history(self, revision: int) -> Path:
        return self._home / "history" / f"plan-{revision:06d}.json"


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


def plan_text(plans: traffic_plan.Plans) -> str:
    """Return the plans as the text of a file."""
    return json.dumps(traffic_plan.dump(plans), indent=2) + "\n"


def operator() -> str:
    """Return the name of the operator: `GRADSERVE_OPERATOR`, else user@machine."""
    return os.environ.get("GRADSERVE_OPERATOR") or f"{getpass.getuser()}@{socket.gethostname()}"


def now() -> str:
    """Return the time as an audit line writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
