"""The file that names the running stack: others find it while its process lives, and only then."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from control.stack.running import RunningStack, announce, find_running

NOWHERE = "http://127.0.0.1:9"
OURS = RunningStack(os.getpid(), "http://127.0.0.1:8123", "http://127.0.0.1:9100")


def test_a_stack_is_found_while_it_runs_and_not_afterwards(tmp_path):
    assert find_running(tmp_path) is None
    with announce(tmp_path, OURS):
        assert find_running(tmp_path) == OURS
    assert find_running(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_stack_that_ends_leaves_the_file_of_one_that_was_started_since(tmp_path):
    later = replace(OURS, gateway="http://127.0.0.1:8124")
    with announce(tmp_path, OURS):
        (tmp_path / "stack.json").write_text(json.dumps(vars(later)))
    assert find_running(tmp_path) == later


def test_a_stack_that_was_killed_is_not_asked(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "stack.json").write_text(json.dumps({"pid": ended.pid, "gateway": NOWHERE, "agent": NOWHERE}))
    assert find_running(tmp_path) is None


@pytest.mark.parametrize("pid", ["not a number", None, [1], 10**30])
def test_a_stack_file_with_a_broken_pid_names_no_running_stack(tmp_path, pid):
    (tmp_path / "stack.json").write_text(json.dumps({"pid": pid, "gateway": NOWHERE, "agent": NOWHERE}))
    assert find_running(tmp_path) is None
