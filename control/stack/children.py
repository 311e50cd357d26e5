"""Child processes that never outlive their parent, not even one that is killed with -9.

Each child leads its own process group. So a Ctrl-C in the terminal reaches only the parent, which stops its children
in order, and the parent can kill the processes that a dead child left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent(signum: int) -> Callable[[], None] | None:
    """Return a `preexec_fn` for the child, by which the kernel sends it `signum` when the parent dies.

    The kernel watches the parent's thread, so start children from the main thread. None without prctl (not Linux).
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork: nothing may be imported after it
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os.kill(os.getpid(), signum)

    return arm


def signal_group(group: int, signum: int) -> None:
    """Send `signum` to every process of the group; an empty group is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def group_is_alive(group: int) -> bool:
    """Return True if a process of the group still runs; zombies do not count."""
    return any(_group_of(stat) == group for stat in Path("/proc").glob("[0-9]*/stat"))


def end_group(group: int, timeout_s: float = 3.0) -> None:
    """Kill every process of the group and return when all are gone, or after `timeout_s`."""
    signal_group(group, signal.SIGKILL)
    end = time.monotonic() + timeout_s
    while group_is_alive(group) and time.monotonic() < end:
        time.sleep(0.02)


def _group_of(stat: Path) -> int | None:
    """Return the process group in a /proc/PID/stat file; None for a process that is gone or a zombie."""
    try:
        # "pid (name) state ppid pgrp …"; the name may hold spaces and brackets.
        state, _, group = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(group)
