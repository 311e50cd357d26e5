"""A watched file: read when it changes, and its last good content stays in force."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from contracts.watched_file import WatchedFile

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "number.txt"


@pytest.fixture
def watched(path: Path) -> WatchedFile[int]:
    return WatchedFile(path, lambda file: int(file.read_text()), missing="there is no number")


def write(path: Path, text: str, moment: int) -> None:
    """Write at a moment of its own: two writes of one size may otherwise fall into one tick of the file system."""
    path.write_text(text)
    os.utime(path, ns=(moment, moment))


def test_the_content_is_read_again_when_the_file_changes(path, watched):
    write(path, "1", 1)
    assert watched.refresh()
    assert (watched.content, watched.error) == (1, None)
    assert not watched.refresh()
    write(path, "2", 2)
    assert watched.refresh()
    assert watched.content == 2


def test_a_broken_file_leaves_the_last_content_and_is_told_once(path, watched):
    write(path, "1", 1)
    watched.refresh()
    write(path, "x", 2)
    assert watched.refresh()
    assert watched.content == 1
    assert "invalid literal" in watched.error
    assert not watched.refresh()
    write(path, "1", 3)
    assert watched.refresh()
    assert (watched.content, watched.error) == (1, None)


def test_a_broken_file_is_read_only_when_it_changes(path):
    reads = []

    def load(file: Path) -> int:
        reads.append(file)
        raise ValueError("broken")

    watched = WatchedFile(path, load, missing="")
    write(path, "x", 1)
    for _ in range(3):
        watched.refresh()
    assert len(reads) == 1


def test_a_missing_file_is_told_and_read_when_it_is_there(path, watched):
    assert watched.refresh()
    assert (watched.content, watched.error) == (None, "there is no number")
    assert not watched.refresh()
    write(path, "3", 1)
    assert watched.refresh()
    assert watched.content == 3
    path.unlink()
    assert watched.refresh()
    assert (watched.content, watched.error) == (3, "there is no number")
    write(path, "3", 1)
    assert watched.refresh()
    assert watched.error is None


def test_a_file_that_could_not_be_read_is_tried_again_though_it_has_not_changed(path):
    is_allowed = []

    def load(file: Path) -> int:
        if not is_allowed:
            raise PermissionError(13, "Permission denied")
        return int(file.read_text())

    watched = WatchedFile(path, load, missing="")
    write(path, "4", 1)
    assert watched.refresh()
    assert watched.error == "number.txt cannot be read (Permission denied)"
    is_allowed.append(True)
    assert watched.refresh()
    assert watched.content == 4
