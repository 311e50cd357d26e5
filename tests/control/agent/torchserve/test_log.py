import asyncio

import pytest

from control.agent.torchserve.log import ServerLog

PREFIX = "2026-01-01T00:00:00,000 [INFO ] MODEL_LOG W-9000-cifar10_2.0.0-stdout - "


@pytest.fixture
def forwarded():
    return []


@pytest.fixture
def log(forwarded):
    return ServerLog(forwarded.append)


def test_the_output_is_forwarded_unchanged(log, forwarded):
    async def forward():
        output = asyncio.StreamReader()
        output.feed_data(b"one\ntwo\xff\nthr")
        output.feed_data(b"ee")
        output.feed_eof()
        await log.forward(output)

    asyncio.run(forward())
    assert b"".join(forwarded) == b"one\ntwo\xff\nthree\n"


def test_a_full_disk_does_not_stop_the_reading():
    def full(_):
        raise OSError(28, "No space left on device")

    log = ServerLog(full)
    log.read_line((PREFIX + "ValueError: too small").encode())
    assert log.load_failure("cifar10", "2.0.0") == "ValueError: too small"


def test_the_handlers_sentence_is_kept_before_the_traceback(log):
    log.read_line(f"{PREFIX}Failed to load model cifar10, exception cifar10 cannot be served: outputs differ".encode())
    log.read_line(f'{PREFIX}    raise RuntimeError(f"{{name}} cannot be served: {{error}}") from error'.encode())
    log.read_line(f"{PREFIX}RuntimeError: 500 - Unknown exception".encode())
    assert log.load_failure("cifar10", "2.0.0") == "cannot be served: outputs differ"
    assert log.load_failure("cifar10", "1.0.0") is None


def test_the_last_exception_is_kept_without_a_sentence(log):
    log.read_line(f"{PREFIX}ModuleNotFoundError: No module named 'nothing'".encode())
    assert log.load_failure("cifar10", "2.0.0") == "ModuleNotFoundError: No module named 'nothing'"


def test_clear_removes_the_errors(log):
    log.read_line(f"{PREFIX}ValueError: no".encode())
    log.clear()
    assert log.load_failure("cifar10", "2.0.0") is None


def test_a_fallback_worker_is_known_by_its_pid_until_a_new_worker_has_it(log):
    for number, pid in ((9000, 41), (9001, 42)):
        log.read_line(PREFIX.replace("9000", str(number)).encode() + b"[PID]%d" % pid)
    log.read_line((PREFIX.replace("9000", "9001") + "the engine cannot run here, falling back to eager fp32").encode())
    assert log.fallback_pids == {42}
    log.read_line((PREFIX.replace("9000", "9002") + "[PID]42").encode())
    assert log.fallback_pids == set()
