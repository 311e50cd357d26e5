"""The file with the local stack's addresses, which `gradserve up` keeps while it runs and other commands read."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from control.release.plan_folder import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class RunningStack:
    """A running `gradserve up`: its process id, and the addresses of its gateway and of its agent's status."""

    pid: int
    gateway: str
    agent: str


@contextlib.contextmanager
def announce(home: Path, stack: RunningStack) -> Iterator[None]:
    """Keep the stack's addresses in `home` while the block runs."""
    path = _path(home)
    write_atomically(path, json.dumps(asdict(stack)) + "\n")
    try:
        yield
    finally:
        if find_running(home) == stack:  # otherwise another stack has been started since
            path.unlink(missing_ok=True)


def find_running(home: Path) -> RunningStack | None:
    """Return the stack that runs with this home; None if none does. A killed stack leaves its file behind."""
    try:
        stack = RunningStack(**json.loads(_path(home).read_text(encoding="utf-8")))
        return stack if _is_alive(int(stack.pid)) else None
    except (OSError, ValueError, TypeError, OverflowError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user
        return True
    return True


def _path(home: Path) -> Path:
    return home / "stack.json"
