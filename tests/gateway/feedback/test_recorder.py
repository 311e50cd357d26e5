"""The recorder: callers never wait for the store, and a store that fails costs the calls of that moment only."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from gateway.feedback import recorder as recorders
from gateway.feedback.recorder import Recorder
from gateway.feedback.store import FeedbackStore

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Run

CAT = {"class": "cat", "confidence": 0.9, "familiar": True}
MODEL = ("cifar10", "1.0.0")


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    store = FeedbackStore(tmp_path / "feedback.db")
    store.create()
    return store


def note(recorder: Recorder, request_id: str, image: bytes = b"image") -> None:
    recorder.note(request_id, image, CAT, MODEL, {})


def ids(store: FeedbackStore) -> list[str]:
    return [call.request_id for call in store.calls()]


def test_a_call_is_kept_with_its_answer_and_only_harmless_headers(store: FeedbackStore, run: Run) -> None:
    async def scene() -> None:
        recorder = Recorder(store, 1.0)
        headers = {
            "user-agent": "u" * 300,
            "content-type": "image/png",
            "cookie": "secret",
            "authorization": "Bearer x",
        }
        recorder.note("r1", b"image", CAT, MODEL, headers)
        recorder.note("r2", b"image", {"class": "dog", "confidence": 1, "familiar": {"unavailable": "no"}}, MODEL, {})
        await recorder.flush()

    run(scene())
    first, second = store.find("r1"), store.find("r2")
    assert first is not None
    assert second is not None
    assert (first.model, first.version, first.class_name, first.confidence, first.familiar) == (
        *MODEL,
        "cat",
        0.9,
        True,
    )
    assert (first.image, first.headers) == (b"image", {"user-agent": "u" * 200, "content-type": "image/png"})
    assert (second.class_name, second.familiar) == ("dog", None)


def test_the_share_of_calls_is_kept_with_its_image(store: FeedbackStore, run: Run) -> None:
    async def scene() -> None:
        chances = iter([0.0, 0.249, 0.25, 0.9])
        recorder = Recorder(store, 0.25, lambda: next(chances))
        for number in range(4):
            note(recorder, f"r{number}")
        await recorder.flush()

    run(scene())
    assert [call.image for call in store.calls()] == [b"image", b"image", None, None]


def test_calls_beyond_the_memorys_bound_are_dropped_and_counted(
    store: FeedbackStore, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "MOST_PENDING_BYTES", 10_000)
    image = bytes(4_000)

    async def scene() -> None:
        recorder = Recorder(store, 1.0)
        for number in range(4):
            note(recorder, f"r{number}", image)
        note(recorder, "small")
        await recorder.flush()
        note(recorder, "later", image)
        await recorder.flush()

    run(scene())
    assert ids(store) == ["r0", "r1", "small", "later"]
    assert [record.dropped for record in caplog.records] == [2]


def test_a_store_that_fails_costs_the_calls_of_that_moment_and_no_more(
    store: FeedbackStore, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        recorder = Recorder(store, 0.0)
        away = store.path.rename(store.path.with_name("away"))
        note(recorder, "lost")
        await recorder.flush()
        away.rename(store.path)
        note(recorder, "kept")
        await recorder.flush()

    with caplog.at_level(logging.WARNING):
        run(scene())
    assert ids(store) == ["kept"]
    assert caplog.records[0].getMessage().startswith("feedback store not written: ")
    assert [record.dropped for record in caplog.records[1:]] == [1]


def test_a_call_that_another_process_has_not_written_yet_is_waited_for(
    store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "FLUSH_S", 0.02)

    async def scene() -> None:
        other, own = Recorder(store, 0.0), Recorder(store, 0.0)
        note(other, "r1")
        finding = asyncio.create_task(own.find("r1"))
        await asyncio.sleep(0.02)
        await other.flush()
        found = await finding
        assert found is not None
        assert found.request_id == "r1"
        assert await own.find("never") is None

    asyncio.run(scene())


def test_what_was_noted_is_written_soon_and_when_the_process_stops(
    store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "FLUSH_S", 0.005)

    async def scene() -> None:
        recorder = Recorder(store, 0.0)
        writing = asyncio.create_task(recorder.run())
        note(recorder, "soon")
        for _ in range(2000):
            await asyncio.sleep(0.005)
            if ids(store):
                break
        assert ids(store) == ["soon"]
        note(recorder, "last")
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(scene())
    assert ids(store) == ["soon", "last"]


def test_a_repeated_report_replaces_the_earlier_one(store: FeedbackStore, run: Run) -> None:
    async def scene() -> None:
        recorder = Recorder(store, 0.0)
        note(recorder, "r1")
        await recorder.flush()
        for name, caller in (("dog", "alice"), ("frog", "bob")):
            await recorder.put("r1", name, "a note", caller)

    run(scene())
    ((_, feedback),) = store.labelled()
    assert (feedback.class_name, feedback.note, feedback.caller) == ("frog", "a note", "bob")
