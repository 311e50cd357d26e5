"""Child processes that never outlive their parent, not even one that is killed with -9.

Each child leads a process group of its own, so that a Ctrl-C in the terminal reaches only the parent, which stops its
children in order, and so that what a dead child left behind can be ended with it.
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
    """A function to run in the child before exec (`preexec_fn`): the kernel sends `signum` when the parent dies.

    The kernel means the parent's thread, so children are started from the main thread. None where there is no prctl.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork: nothing may be imported after it
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signum)

    return arm


def signal_group(group: int, signum: int) -> None:
    """Sends `signum` to every process of the group, if there is one left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def group_is_alive(group: int) -> bool:
    """Whether a process of the group still runs; zombies do not count."""
    return any(_group_of(stat) == group for stat in Path("/proc").glob("[0-9]*/stat"))


def end_group(group: int, timeout_s: float = 3.0) -> None:
    """Kills what is left of the group and returns when it is gone (or the time is up)."""
    signal_group(group, signal.SIGKILL)
    end = time.monotonic() + timeout_s
    while group_is_alive(group) and time.monotonic() < end:
        time.sleep(0.02)


def _group_of(stat: Path) -> int | None:
    """The process group in a /proc/PID/stat file, None for a process that is gone or a zombie."""
    try:
        # "pid (name) state ppid pgrp …"; the name may hold spaces and brackets.
        state, _, group = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(group)
