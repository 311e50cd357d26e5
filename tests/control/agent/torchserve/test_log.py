import asyncio

import pytest

from control.agent.torchserve.log import ServerLog

PREFIX = "2026-01-01T00:00:00,000 [INFO ] MODEL_LOG W-9000-cifar10_2.0.0-stdout - "


@pytest.fixture
def passed_on():
    return []


@pytest.fixture
def log(passed_on):
    return ServerLog(passed_on.append)


def test_everything_is_passed_on_unchanged(log, passed_on):
    async def follow():
        output = asyncio.StreamReader()
        output.feed_data(b"one\ntwo\xff\nthr")
        output.feed_data(b"ee")
        output.feed_eof()
        await log.follow(output)

    asyncio.run(follow())
    assert b"".join(passed_on) == b"one\ntwo\xff\nthree\n"


def test_a_full_disk_stops_neither_reading_nor_reasons():
    def full(_):
        raise OSError(28, "No space left on device")

    log = ServerLog(full)
    log.take((PREFIX + "ValueError: too small").encode())
    assert log.why("cifar10", "2.0.0") == "ValueError: too small"


def test_the_handlers_sentence_is_the_reason_and_outlasts_the_traceback(log):
    log.take(f"{PREFIX}Failed to load model cifar10, exception cifar10 cannot be served: outputs differ".encode())
    log.take(f'{PREFIX}    raise RuntimeError(f"{{name}} cannot be served: {{error}}") from error'.encode())
    log.take(f"{PREFIX}RuntimeError: 500 - Unknown exception".encode())
    assert log.why("cifar10", "2.0.0") == "cannot be served: outputs differ"
    assert log.why("cifar10", "1.0.0") is None


def test_without_a_sentence_the_last_exception_is_the_reason(log):
    log.take(f"{PREFIX}ModuleNotFoundError: No module named 'nothing'".encode())
    assert log.why("cifar10", "2.0.0") == "ModuleNotFoundError: No module named 'nothing'"


def test_a_new_server_starts_without_complaints(log):
    log.take(f"{PREFIX}ValueError: no".encode())
    log.forget()
    assert log.why("cifar10", "2.0.0") is None


def test_workers_that_fall_back_are_known_by_their_process_until_another_takes_the_number(log):
    for number, pid in ((9000, 41), (9001, 42)):
        log.take(PREFIX.replace("9000", str(number)).encode() + b"[PID]%d" % pid)
    log.take((PREFIX.replace("9000", "9001") + "the engine cannot run here, falling back to eager fp32").encode())
    assert log.fallen_back == {42}
    log.take((PREFIX.replace("9000", "9002") + "[PID]42").encode())
    assert log.fallen_back == set()
