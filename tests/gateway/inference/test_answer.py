"""The call and its answer: whose fault an answer tells of, and the times of a call on its way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from contracts.wire import Options
from gateway.errors import DeadlinePassed
from gateway.inference.answer import Answer, Call, Progress
from gateway.inference.torchserve import Deadline

if TYPE_CHECKING:
    from conftest import Run

CAT: dict[str, Any] = {"class": "cat", "confidence": 0.9}


def failed(status: int, code: str) -> dict[str, Any]:
    return {"error": {"status": status, "code": code, "detail": "A sentence."}}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Answer(entries=(CAT,)), ""),
        (Answer(entries=(CAT, failed(422, "image_unreadable"))), ""),
        (Answer(entries=(failed(413, "image_too_large"), failed(500, "handler_failed"), CAT)), "handler_failed"),
        (Answer(entries=(failed(503, "saturated"), failed(500, "handler_failed"))), "saturated"),
        (Answer(error=DeadlinePassed(1), entries=(failed(500, "handler_failed"),)), "deadline_passed"),
    ],
)
def test_an_answers_code_is_its_error_or_that_of_the_first_image_that_the_service_failed(
    answer: Answer, code: str
) -> None:
    assert answer.code == code


def test_a_call_names_its_version_and_model_and_is_itself_without_them(run: Run) -> None:
    async def scene() -> tuple[Call, Call]:
        call = Call(Deadline(1.0), Options("r1"), "alice")
        assert call.of(None, None) is call
        return call, call.of("1.0.0", "photos")

    call, named = run(scene())
    assert (named.version, named.model, named.caller, named.deadline) == ("1.0.0", "photos", "alice", call.deadline)
    assert (call.version, call.model) == (None, None)


def spend(progress: Progress, *, fails: bool) -> None:
    """Spend 2 ms in the stage `model`."""
    with progress.stage("model"):
        time.sleep(0.002)
        if fails:
            raise ZeroDivisionError


def test_the_answer_has_what_was_noted_on_the_way_and_the_sum_of_each_stages_times(run: Run) -> None:
    async def scene() -> Call:
        return Call(Deadline(1.0), Options("r1"))

    progress = Progress(run(scene()))
    progress.model, progress.version, progress.batch_id, progress.is_hurried = "cifar10", "1.0.0", "r0", True
    spend(progress, fails=False)
    with pytest.raises(ZeroDivisionError):
        spend(progress, fails=True)
    answer = progress.answer((CAT,))
    assert (answer.model, answer.version, answer.batch_id, answer.is_hurried) == ("cifar10", "1.0.0", "r0", True)
    assert answer.entries == (CAT,)
    assert list(answer.timings) == ["model"]
    assert answer.timings["model"] >= 0.004, "a stage that failed counts too"
