"""API keys: their file holds no secret, stays readable, and what is impossible in it is named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gateway.auth import keys

if TYPE_CHECKING:
    from pathlib import Path


def test_the_file_holds_no_secret_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    secret, key = keys.make_key("alice", ["predict"], created="2026-01-31")
    path = tmp_path / "keys.json"
    keys.save_keys(path, [key])
    assert secret not in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.load_keys(path) == (key,)
    assert len(secret) > 40


def test_a_changed_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.save_keys(path, [])
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    keys.save_keys(path, [])
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_key_file_of_the_present_schema_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    row = {"name": "alice", "sha256": "0" * 64, "scopes": ["predict"], "created": "2026-01-31"}
    path.write_text(json.dumps({"schema": 1, "keys": [row, {**row, "name": "bob", "sha256": "1" * 64}]}))
    old = keys.load_keys(path)
    assert old[0] == keys.Key("alice", "0" * 64, ("predict",), "2026-01-31")
    keys.save_keys(path, old)
    assert keys.load_keys(path) == old


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"expires": "soon"}, "write like 2026-12-31T00:00:00"),
        ({"expires": "2026-12-31T00:00:00"}, "write like 2026-12-31T00:00:00"),
        ({"quota": "often"}, "write like 600/minute"),
    ],
)
def test_an_impossible_expiry_or_quota_is_refused(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(keys.KeyFileError, match=sentence):
        keys.make_key("a", ["read"], **changes)
