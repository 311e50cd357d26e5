"""The feedback store: one SQLite file with the answered calls, sampled images, and what callers said was right.

All gateway processes of a host write to it, and the `gradserve` command reads it, so it runs in write-ahead mode, which
needs a local disk. It keeps no more than `max_bytes` and no row for longer than `days`: the oldest calls without
feedback go first. Only the headers in `KEPT_HEADERS` are kept; keys, cookies and addresses never are.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

SCHEMA = 1
KEPT_HEADERS = ("content-type", "user-agent")
DAY_S = 86_400.0
_BUSY_S = 5.0
_PRUNED_AT_ONCE = 256
_TABLES = """
CREATE TABLE IF NOT EXISTS calls (
  request_id TEXT PRIMARY KEY, at REAL NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL, class TEXT NOT NULL,
  confidence REAL NOT NULL, familiar INTEGER, headers TEXT NOT NULL, image BLOB
);
CREATE INDEX IF NOT EXISTS calls_by_time ON calls(at);
CREATE TABLE IF NOT EXISTS feedback (
  request_id TEXT PRIMARY KEY, at REAL NOT NULL, class TEXT NOT NULL, note TEXT NOT NULL, caller TEXT NOT NULL
);
"""
_COLUMNS = "calls.request_id, calls.at, model, version, calls.class, confidence, familiar, headers, image"


class StoreError(Exception):
    """The store at `path` cannot be used, because of `problem`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"the feedback store {path} cannot be used: {problem}")


@dataclass(frozen=True)
class LoggedCall:
    """One answered call. `image` is None if it was not sampled, `familiar` if the version cannot tell.

    `at` is Unix time in seconds; `headers` has those of `KEPT_HEADERS` that the caller sent.
    """

    request_id: str
    at: float
    model: str
    version: str
    class_name: str
    confidence: float
    familiar: bool | None
    headers: Mapping[str, str]
    image: bytes | None


@dataclass(frozen=True)
class Feedback:
    """The right class of a call's image, by `caller` (a key's name, empty without keys) at the Unix time `at`."""

    request_id: str
    at: float
    class_name: str
    note: str
    caller: str


class FeedbackStore:
    """The store in the file `path`. Each method opens its own connection, so that it can be called from any thread.

    Every method raises `StoreError` if the file cannot be read or written.
    """

    def __init__(self, path: Path, *, max_bytes: int = 2**30, days: float = 30.0) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._days = days

    def create(self) -> None:
        """Create the file if it does not exist; only its owner may read it.

        Raises:
            StoreError: it cannot be created, or is of another schema.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StoreError(self.path, error.strerror or type(error).__name__) from error
        with self._writing() as database:
            database.execute("PRAGMA journal_mode = WAL")
            (schema,) = database.execute("PRAGMA user_version").fetchone()
            if schema not in (0, SCHEMA):
                raise StoreError(self.path, f"it has schema {schema}, and this release reads {SCHEMA}: move it away")
            database.executescript(_TABLES)
            database.execute(f"PRAGMA user_version = {SCHEMA}")

    def add(self, calls: Iterable[LoggedCall]) -> None:
        """Add calls; a call with the id of an earlier one replaces it."""
        rows = [
            (
                call.request_id,
                call.at,
                call.model,
                call.version,
                call.class_name,
                call.confidence,
                call.familiar,
                json.dumps(dict(call.headers)),
                call.image,
            )
            for call in calls
        ]
        with self._writing() as database, database:
            database.executemany("INSERT OR REPLACE INTO calls VALUES (?,?,?,?,?,?,?,?,?)", rows)

    def find(self, request_id: str) -> LoggedCall | None:
        """Return the call with this id; None if the store has none."""
        with self._writing() as database:
            row = database.execute(f"SELECT {_COLUMNS} FROM calls WHERE request_id = ?", (request_id,)).fetchone()  # noqa: S608
        return _call(row) if row else None

    def put(self, feedback: Feedback) -> None:
        """Keep the feedback; it replaces an earlier one on the same call."""
        row = (feedback.request_id, feedback.at, feedback.class_name, feedback.note, feedback.caller)
        with self._writing() as database, database:
            database.execute("INSERT OR REPLACE INTO feedback VALUES (?,?,?,?,?)", row)

    def calls(
        self, *, since: float = 0.0, until: float = float("inf"), with_image: bool = False
    ) -> Iterator[LoggedCall]:
        """Yield the calls from `since` to before `until` (Unix times), oldest first, or only those with an image."""
        query = f"SELECT {_COLUMNS} FROM calls WHERE at >= ? AND at < ?"  # noqa: S608 - a constant
        query += " AND image IS NOT NULL" if with_image else ""
        with self._writing() as database:
            yield from map(_call, database.execute(f"{query} ORDER BY at, request_id", (since, until)))

    def labelled(self) -> Iterator[tuple[LoggedCall, Feedback]]:
        """Yield the calls with feedback, oldest feedback first."""
        query = (
            f"SELECT {_COLUMNS}, feedback.at, feedback.class, note, caller FROM calls "  # noqa: S608 - a constant
            "JOIN feedback USING (request_id) ORDER BY feedback.at, calls.request_id"
        )
        with self._writing() as database:
            for row in database.execute(query):
                yield _call(row[:9]), Feedback(row[0], *row[9:])

    def prune(self, now: float | None = None) -> None:
        """Remove what is older than `days`, then the oldest calls until the rows fit into `max_bytes`."""
        before = (time.time() if now is None else now) - self._days * DAY_S
        with self._writing() as database:
            database.execute("PRAGMA secure_delete = ON")  # a removed image is overwritten, not only forgotten
            with database:
                database.execute("DELETE FROM calls WHERE at < ?", (before,))
                database.execute("DELETE FROM feedback WHERE request_id NOT IN (SELECT request_id FROM calls)")
            while _used_bytes(database) > self._max_bytes and self._remove_oldest(database):
                pass

    def _remove_oldest(self, database: sqlite3.Connection) -> bool:
        """Remove a few of the oldest calls, those without feedback first; return False if there are none."""
        oldest = (
            "SELECT calls.request_id FROM calls LEFT JOIN feedback USING (request_id) "
            "ORDER BY feedback.request_id IS NOT NULL, calls.at LIMIT ?"
        )
        with database:
            found = database.execute(oldest, (_PRUNED_AT_ONCE,)).fetchall()
            database.executemany("DELETE FROM calls WHERE request_id = ?", found)
            database.executemany("DELETE FROM feedback WHERE request_id = ?", found)
        return bool(found)

    def _writing(self) -> _Connection:
        return _Connection(self.path)


class _Connection:
    """A connection that is closed at the end of its block, and whose errors become `StoreError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> sqlite3.Connection:
        try:
            # `rw`: a missing file is an error, and is not created with a mode that others can read.
            self._database = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
            self._database.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as error:
            raise StoreError(self._path, str(error)) from error
        return self._database

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with closing(self._database):
            if isinstance(error, sqlite3.Error):
                raise StoreError(self._path, str(error)) from error


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _call(row: tuple[Any, ...]) -> LoggedCall:
    request_id, at, model, version, class_name, confidence, familiar, headers, image = row
    known = None if familiar is None else bool(familiar)
    return LoggedCall(request_id, at, model, version, class_name, confidence, known, json.loads(headers), image)
