"""The gateway's calls: what each sends, how long batches are split, and which refusals are sent again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gradserve import AnswerUnreadable, Evidence, Failed, GatewayProblem, Prediction
from gradserve.calls import BATCH_BYTES, BATCH_IMAGES, read_image, split

if TYPE_CHECKING:
    from collections.abc import Callable

PNG = b"\x89PNG fake image"
CAT = {
    "class": "cat",
    "confidence": 0.9,
    "top": [{"class": "cat", "confidence": 0.9}],
    "model": {"name": "cifar10", "version": "1.0.0"},
    "request_id": "r1",
}


def batch(entries: list[dict[str, Any]]) -> httpx.Response:
    return httpx.Response(200, json={"results": entries, "model": CAT["model"], "request_id": "r2"})


def refusing(times: int, status: int, **headers: str) -> tuple[Callable[..., httpx.Response], list[httpx.Request]]:
    calls: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) <= times:
            return httpx.Response(status, json={"code": "saturated"}, headers=headers)
        return httpx.Response(200, json=CAT)

    return answer, calls


@pytest.mark.parametrize("kind", [str, Path, lambda path: Path(path).read_bytes()])
def test_an_image_is_a_path_or_the_bytes(tmp_path: Path, kind) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(PNG)
    assert read_image(kind(path)) == PNG


def test_a_long_batch_is_sent_in_several_calls_and_answered_in_order(asking) -> None:
    calls: list[int] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        images = [part.split(b"\r\n--")[0] for part in request.read().split(b"\r\n\r\n")[1:]]
        calls.append(len(images))
        error = {"error": {"status": 422, "code": "image_unreadable", "detail": "no image"}}
        return batch([error if image == b"bad" else {**CAT, "class": image.decode()} for image in images])

    images = [f"image{number}".encode() for number in range(BATCH_IMAGES + 3)]
    images[-1] = b"bad"
    entries = asking(gateway)("predict_batch", images)
    assert calls == [BATCH_IMAGES, 3]
    assert [entry.class_name for entry in entries[:-1]] == [image.decode() for image in images[:-1]]
    assert {entry.request_id for entry in entries[:-1]} == {"r2"}
    assert isinstance(entries[0], Prediction)
    assert isinstance(entries[-1], Failed)
    assert (entries[-1].status, entries[-1].code, "error" in entries[-1]) == (422, "image_unreadable", True)


def test_a_batch_is_also_split_by_bytes() -> None:
    half = bytes(BATCH_BYTES // 2)
    assert [len(group) for group in split([half, half, b"x", half])] == [2, 2]
    assert [len(group) for group in split([bytes(BATCH_BYTES + 1), b"x"])] == [1, 1]


def test_an_empty_batch_asks_nobody(asking) -> None:
    assert asking(lambda _: pytest.fail("a call"))("predict_batch", []) == []


def test_evidence_asks_for_what_was_asked_for(asking, document) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((dict(request.url.params), request.headers["accept"]))
        return httpx.Response(200, json=document())

    ask = asking(gateway)
    ask("evidence", b"x")
    ask("evidence", b"x", target="dog", coverage=0.9, test=True, similar=0, heatmap=False)
    everything = {"target": "dog", "coverage": "0.9", "test": "true", "similar": "0", "heatmap": "none"}
    assert seen == [({"heatmap": "base64"}, "application/json"), (everything, "application/json")]


def test_a_batch_of_explanations_is_read_entry_by_entry(asking, document) -> None:
    error = {"error": {"status": 400, "code": "unknown_target", "detail": "no such class"}}

    def gateway(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/explain/batch"
        entry = {name: value for name, value in document().items() if name not in ("model", "request_id")}
        return batch([entry, error])

    explained, failed = asking(gateway)("explain_batch", [b"x", b"y"], coverage=0.9)
    assert isinstance(explained, Evidence)
    assert (explained.target.class_name, explained.request_id) == ("dog", "r2")
    assert isinstance(failed, Failed)


@pytest.mark.parametrize("status", [503, 429])
def test_a_refused_call_is_sent_again_after_retry_after(asking, status: int) -> None:
    answer, calls = refusing(2, status, **{"retry-after": "3"})
    pauses: list[float] = []
    assert asking(answer, pauses)("predict", b"x").class_name == "cat"
    assert len(calls) == 3
    assert all(3 <= pause <= 4.5 for pause in pauses)


@pytest.mark.parametrize("status", [400, 500, 502, 503, 504])
def test_a_call_on_which_work_may_have_begun_is_not_sent_again(asking, status: int) -> None:
    answer, calls = refusing(1, status)  # without Retry-After, a 503 may be a proxy's
    with pytest.raises(GatewayProblem):
        asking(answer)("predict", b"x")
    assert len(calls) == 1


def test_the_client_does_not_wait_for_a_daily_quota(asking) -> None:
    answer, calls = refusing(1, 429, **{"retry-after": "86000"})
    with pytest.raises(GatewayProblem, match="429 saturated"):
        asking(answer)("predict", b"x")
    assert len(calls) == 1


def test_a_batch_answer_of_another_length_is_refused(asking) -> None:
    with pytest.raises(AnswerUnreadable, match="1 entries for 2 images"):
        asking(lambda _: batch([CAT]))("predict_batch", [b"x", b"y"])
