"""Process groups end whole, and a child does not outlive its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from control.stack.children import die_with_parent, end_group, group_is_alive, signal_group

if TYPE_CHECKING:
    from collections.abc import Callable

SLEEPER = "import time; time.sleep(60)"
PARENT_OF_SLEEPER = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {SLEEPER!r}]).pid, flush=True)
"""


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def test_a_group_is_alive_while_a_grandchild_lives_and_ends_with_it() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PARENT_OF_SLEEPER], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        child.wait(20)
        assert group_is_alive(child.pid)
        end_group(child.pid)
        assert not group_is_alive(child.pid)
        signal_group(child.pid, signal.SIGTERM)  # of an empty group: no error
    # It is gone, or a zombie that its new parent has not waited for yet.
    wait_until(lambda: _state(grandchild) in {"", "Z"})


def test_a_zombie_does_not_keep_its_group_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    wait_until(lambda: _state(child.pid) == "Z")
    assert not group_is_alive(child.pid)
    child.wait()


def test_a_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    code = f"""
import signal, subprocess, sys, time
from control.stack.children import die_with_parent
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=True,
                         preexec_fn=die_with_parent(signal.SIGTERM))
print(child.pid, flush=True)
time.sleep(60)
"""
    assert die_with_parent(signal.SIGTERM) is not None
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert group_is_alive(child)
        parent.kill()
        parent.wait()
        wait_until(lambda: not group_is_alive(child))


def _state(pid: int) -> str:
    """Return the letter of the process's state, Z for a zombie; an empty text if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
