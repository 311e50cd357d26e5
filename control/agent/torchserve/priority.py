"""Lower priority for workers that load while others serve, and for shadows: importing torch takes a core for seconds.

Lowering a priority is always allowed, restoring it is not. Without CAP_SYS_NICE (or a limit that permits it) nothing is
lowered, because a promoted version would stay slow.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from control.agent.torchserve.management import Registered

LOW_NICE = 15
_CAP_SYS_NICE = 23


def can_restore_priority() -> bool:
    """Return True if this process may restore the normal niceness of its children."""
    # RLIMIT_NICE counts from 20 (nice 0) to 1 (nice 19), getrlimit(2).
    if resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20:
        return True
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_NICE & 1)
    return False


class WorkerPriority:
    """The workers whose priority was lowered. It is restored when they are ready and not a shadow's."""

    def __init__(self, *, is_allowed: bool) -> None:
        self._is_allowed = is_allowed
        self._lowered: set[int] = set()
        self._normal = os.getpriority(os.PRIO_PROCESS, 0)

    def apply(self, entries: Iterable[Registered], shadows: Iterable[Registered] = ()) -> None:
        """Lower the priority of shadows' workers and of workers that load while one is ready; restore the others."""
        shadowing = [worker for entry in shadows for worker in entry.workers if worker.pid is not None]
        serving = [worker for entry in entries for worker in entry.workers if worker.pid is not None]
        workers = serving + shadowing
        is_serving = any(worker.ready for worker in workers)
        for worker in workers if self._is_allowed else ():
            pid = worker.pid or 0
            is_low = worker in shadowing or not worker.ready
            if pid in self._lowered and not is_low:
                set_niceness(pid, self._normal)
                self._lowered.discard(pid)
            elif pid not in self._lowered and is_low and is_serving:
                set_niceness(pid, LOW_NICE)
                self._lowered.add(pid)
        self._lowered &= {worker.pid for worker in workers if worker.pid is not None}


def set_niceness(pid: int, niceness: int) -> None:
    """Set the niceness of every thread of the process; one that has ended is no error."""
    for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
