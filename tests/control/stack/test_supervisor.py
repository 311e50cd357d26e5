"""The log of a process that writes more than is kept: bounded, in order, with the newest lines."""

import os
import resource
import sys
import time

import pytest

from control.errors import ProcessFailed
from control.stack.supervisor import SupervisedProcess, check_all, rotate

# Numbered lines, as fast as a busy gateway logs.
WRITER = """
import os, time
number = 0
while number < 10_000:
    for _ in range(50):
        os.write(1, b"%08d %s\\n" % (number, b"x" * 190))
        number += 1
    time.sleep(0.01)
time.sleep(60)
"""
LAST = b"00009999 "
LOG_BYTES = 600_000


@pytest.fixture
def process(tmp_path):
    process = SupervisedProcess(
        "writer", [sys.executable, "-c", WRITER], dict(os.environ), tmp_path / "writer.log", 5.0, LOG_BYTES
    )
    yield process
    process.stop(at_once=True)


def test_a_log_stays_within_its_bytes_and_keeps_the_newest_lines(process):
    began, largest = time.monotonic(), 0
    files = [process.log.with_name(f"writer.log{suffix}") for suffix in (".3", ".2", ".1", "")]
    while not any(path.exists() and LAST in path.read_bytes() for path in files):
        assert time.monotonic() - began < 60
        check_all([process])
        largest = max(largest, sum(path.stat().st_size for path in process.log.parent.iterdir()))
        time.sleep(0.05)
    process.stop()
    assert sorted(process.log.parent.iterdir()) == sorted(files)
    assert largest < LOG_BYTES * 2
    lines = [line for file in files for line in file.read_bytes().splitlines()]
    assert {len(line) for line in lines} == {199}, "no line is torn"
    numbers = [int(line[:8]) for line in lines]
    assert numbers == sorted(numbers)
    assert len(numbers) < 5_000, "more than twice as much was written as is kept"
    assert numbers[-1] - numbers[0] + 1 - len(numbers) < 20, "fewer than 20 lines were lost"


def test_a_log_is_emptied_if_the_disk_has_no_room_for_a_copy(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(bytes(2000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a larger file cannot be written, as on a full disk
    try:
        rotate(log, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("a.log", 0)]


def test_a_process_that_dies_three_times_within_a_minute_is_given_up_with_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-Sc", "raise SystemExit('the reason')"]
    process = SupervisedProcess("gateway", command, dict(os.environ), tmp_path / "gateway.log", 5.0, LOG_BYTES)
    process.start()
    for second in (10, 20, 100, 110):  # the first two are forgotten
        process.child.wait()
        process.check(second)
        assert process.child is None, "it waits before it starts the process again"
        process.check(second + 5)
    process.child.wait()
    with pytest.raises(ProcessFailed, match=r"(?s)gateway died 3 times within a minute.*the reason"):
        process.check(120)
