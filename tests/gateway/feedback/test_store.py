"""The feedback store: shared by processes, bounded in bytes and days, and without anything secret."""

from __future__ import annotations

import multiprocessing
import sqlite3
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from gateway.feedback.store import DAY_S, Feedback, FeedbackStore, LoggedCall, StoreError

if TYPE_CHECKING:
    from pathlib import Path

CALL = LoggedCall("r0", 1000.0, "cifar10", "1.0.0", "cat", 0.9, True, {"user-agent": "curl"}, b"image")


def call(number: int, **changes: Any) -> LoggedCall:
    return replace(CALL, request_id=f"r{number}", at=1000.0 + number, **changes)


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    store = FeedbackStore(tmp_path / "home" / "feedback.db", max_bytes=2_000_000, days=30)
    store.create()
    return store


def test_a_call_comes_back_as_it_was_noted(store: FeedbackStore) -> None:
    store.add([CALL, call(1, familiar=None, image=None)])
    assert store.find("r0") == CALL
    assert store.find("r1") == call(1, familiar=None, image=None)
    assert store.find("r2") is None


def test_only_the_owner_may_read_the_files(store: FeedbackStore) -> None:
    other = sqlite3.connect(store.path)  # an open connection keeps the log files there
    other.execute("SELECT * FROM calls")
    store.add([CALL])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.path.parent.iterdir()}
    other.close()
    assert modes == dict.fromkeys(("feedback.db", "feedback.db-wal", "feedback.db-shm"), 0o600)


def test_a_repeat_replaces_the_feedback(store: FeedbackStore) -> None:
    store.add([CALL])
    store.put(Feedback("r0", 1.0, "dog", "", "alice"))
    store.put(Feedback("r0", 2.0, "frog", "green", "bob"))
    assert list(store.labelled()) == [(CALL, Feedback("r0", 2.0, "frog", "green", "bob"))]


def test_calls_are_read_by_time_and_with_images_only_on_request(store: FeedbackStore) -> None:
    store.add([call(3), call(1, image=None), call(2)])
    assert [found.request_id for found in store.calls()] == ["r1", "r2", "r3"]
    assert [found.request_id for found in store.calls(since=1002.0, until=1003.0)] == ["r2"]
    assert [found.request_id for found in store.calls(with_image=True)] == ["r2", "r3"]


def test_what_is_too_old_goes_with_its_feedback(store: FeedbackStore) -> None:
    store.add([call(1), call(2, image=None)])
    store.put(Feedback("r1", 1.0, "dog", "", ""))
    store.prune(now=1001.5 + 30 * DAY_S)
    assert [found.request_id for found in store.calls()] == ["r2"]
    assert list(store.labelled()) == []


def test_the_oldest_calls_go_when_the_bytes_are_used_up_those_with_feedback_last(store: FeedbackStore) -> None:
    store.add(call(number, image=bytes(4000)) for number in range(1000))
    store.put(Feedback("r0", 1.0, "dog", "", ""))
    store.prune(now=2000.0)
    left = [found.request_id for found in store.calls()]
    assert left[0] == "r0"
    assert left[-1] == "r999"
    assert 200 < len(left) < 500
    with sqlite3.connect(store.path) as database:
        pages, free, size = (
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    database.close()
    assert (pages - free) * size <= 2_000_000


def test_a_removed_image_is_not_left_in_the_file(store: FeedbackStore) -> None:
    store.add([call(1, image=b"a very secret image")])
    store.prune(now=1001.5 + 30 * DAY_S)
    with sqlite3.connect(store.path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    assert b"a very secret image" not in store.path.read_bytes()


def write_many(path: Path, process: int) -> None:
    store = FeedbackStore(path)
    for number in range(20):
        store.add([replace(CALL, request_id=f"p{process}-{number}")])


def test_processes_write_to_it_at_the_same_time(store: FeedbackStore) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(store.path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(list(store.calls())) == 60


def test_a_file_of_another_schema_or_no_database_is_named(tmp_path: Path, store: FeedbackStore) -> None:
    with sqlite3.connect(store.path) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(StoreError, match="schema 9, and this release reads 1: move it away"):
        store.create()
    (tmp_path / "text").write_text("no database, but a text that is long enough for one" * 100)
    with pytest.raises(StoreError, match="not a database"):
        FeedbackStore(tmp_path / "text").create()


def test_a_missing_store_is_not_created_by_a_reader(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        FeedbackStore(tmp_path / "missing.db").find("r1")
    assert not (tmp_path / "missing.db").exists()
