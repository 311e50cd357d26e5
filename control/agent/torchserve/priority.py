"""Workers that load while others serve give way, importing torch takes seconds of a whole core; and shadows always do.

Lowering a priority is always allowed, raising it again is not: without CAP_SYS_NICE (or a limit that permits it)
nothing is lowered, because a promoted version must not stay slow for ever.
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
    """Whether this process may set the niceness of its children back to normal."""
    # RLIMIT_NICE counts from 20 (nice 0) to 1 (nice 19), getrlimit(2).
    if resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20:
        return True
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_NICE & 1)
    return False


class WorkerPriority:
    """Remembers which workers were slowed down, and undoes it when they are ready and no shadow's."""

    def __init__(self, *, is_allowed: bool) -> None:
        self._is_allowed = is_allowed
        self._lowered: set[int] = set()
        self._normal = os.getpriority(os.PRIO_PROCESS, 0)

    def apply(self, entries: Iterable[Registered], shadows: Iterable[Registered] = ()) -> None:
        """Lowers shadows' workers, and others that load while one is ready; restores who is neither any more."""
        copying = [worker for entry in shadows for worker in entry.workers if worker.pid is not None]
        working = [worker for entry in entries for worker in entry.workers if worker.pid is not None]
        workers = working + copying
        somebody_serves = any(worker.ready for worker in workers)
        for worker in workers if self._is_allowed else ():
            pid = worker.pid or 0
            gives_way = worker in copying or not worker.ready
            if pid in self._lowered and not gives_way:
                set_niceness(pid, self._normal)
                self._lowered.discard(pid)
            elif pid not in self._lowered and gives_way and somebody_serves:
                set_niceness(pid, LOW_NICE)
                self._lowered.add(pid)
        self._lowered &= {worker.pid for worker in workers if worker.pid is not None}


def set_niceness(pid: int, niceness: int) -> None:
    """Sets the niceness of every thread of the process; a thread or process that has gone is no error."""
    for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
