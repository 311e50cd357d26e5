import os
import subprocess

import pytest

from control.agent.torchserve.management import Registered, Worker
from control.agent.torchserve.priority import LOW_NICE, WorkerPriority, can_restore_priority


def entry(*workers):
    return Registered("1.0.0", "m.mar", len(workers), tuple(Worker(pid, ready=ready) for pid, ready in workers), 0, 100)


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def niceness(process):
    return os.getpriority(os.PRIO_PROCESS, process.pid)


@pytest.mark.skipif(not can_restore_priority(), reason="needs CAP_SYS_NICE")
def test_a_worker_that_loads_beside_a_serving_one_has_low_priority_until_it_is_ready(process):
    priority = WorkerPriority(is_allowed=True)
    priority.apply([entry((process.pid, False)), entry((os.getpid(), True))])
    assert niceness(process) == LOW_NICE
    priority.apply([entry((process.pid, True)), entry((os.getpid(), True))])
    assert niceness(process) == os.getpriority(os.PRIO_PROCESS, 0) == 0


def test_no_priority_is_lowered_if_no_worker_serves_or_it_could_not_be_restored(process):
    WorkerPriority(is_allowed=True).apply([entry((process.pid, False))])
    WorkerPriority(is_allowed=False).apply([entry((process.pid, False)), entry((os.getpid(), True))])
    assert niceness(process) == os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.skipif(not can_restore_priority(), reason="needs CAP_SYS_NICE")
def test_a_shadows_worker_has_low_priority_while_it_is_a_shadow(process):
    priority, serving, shadow = (
        WorkerPriority(is_allowed=True),
        entry((os.getpid(), True)),
        entry((process.pid, True)),
    )
    priority.apply([serving], [shadow])
    assert niceness(process) == LOW_NICE
    priority.apply([serving, shadow])
    assert niceness(process) == 0
