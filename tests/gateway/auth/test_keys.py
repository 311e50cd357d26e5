"""API keys: their file holds no secret, stays readable, and what is impossible in it is named."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no key file"),
        ('{"schema":1,"keys":[1]}', "a key is an object"),
        ('{"schema":1,"keys":[{"name":"a","sha256":"x","scopes":["read"]}]}', "no SHA-256"),
        ('{"schema":1,"keys":[{"name":"a b","sha256":"x","scopes":["read"]}]}', "does not match"),
        ('{"schema":1,"keys":[{"name":"a","sha256":"%s","scopes":["all"]}]}' % ("0" * 64), "use one or more of"),
        ('{"schema":1,"keys":[{"name":"a","sha256":"%s","scopes":"read"}]}' % ("0" * 64), "no list of scopes"),
        ('{"schema":3,"keys":[{"name":"a","sha256":"%s","scopes":["read"],"models":"m"}]}' % ("0" * 64), "of models"),
        ('{"schema":3,"keys":[{"name":"a","sha256":"%s","scopes":["read"],"models":[]}]}' % ("0" * 64), "leave it out"),
        (
            '{"schema":3,"keys":[{"name":"a","sha256":"%s","scopes":["read"],"models":["/"]}]}' % ("0" * 64),
            "like cifar",
        ),
        ('{"schema":4,"keys":[]}', "no key file of schema 1 or 2 or 3"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused_with_the_reason(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(keys.KeyFileError, match=sentence):
        keys.load_keys(path)


def test_two_keys_of_one_name_are_refused_unless_all_but_one_expire() -> None:
    lasting, other = keys.Key("a", "0" * 64, ("read",)), keys.Key("a", "1" * 64, ("read",))
    ending = keys.Key("a", "2" * 64, ("read",), expires="2026-12-31T00:00:00+00:00")
    assert keys.check_names([lasting, ending]) == (lasting, ending)
    for wrong in ([lasting, other], [ending, ending], [lasting, keys.Key("b", lasting.sha256, ("read",))]):
        with pytest.raises(keys.KeyFileError, match="there are two keys named"):
            keys.check_names(wrong)


def test_an_entry_of_a_setting_is_a_key_and_one_that_is_none_is_not_quoted() -> None:
    assert keys.parse_entry(f"alice:{'0' * 64}:predict+read") == keys.Key("alice", "0" * 64, ("predict", "read"))
    for wrong in ("gs_a-secret-in-the-wrong-place", "alice:gs_a-secret", "alice:gs_a-secret:read"):
        with pytest.raises(keys.KeyFileError) as refused:
            keys.parse_entry(wrong)
        assert "secret" not in str(refused.value)


def test_a_key_is_refused_from_the_moment_at_which_it_expires() -> None:
    key = keys.Key("a", "0" * 64, ("read",), expires="2026-12-31T02:00:00+02:00")
    end = datetime(2026, 12, 31, tzinfo=UTC)
    assert [key.is_expired(end - timedelta(seconds=1)), key.is_expired(end)] == [False, True]
    assert not keys.Key("a", "0" * 64, ("read",)).is_expired(datetime.max.replace(tzinfo=UTC))


def test_a_file_that_cannot_be_written_leaves_the_former_one_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.save_keys(path, [keys.make_key("a", ["read"])[1]])
    former = path.read_bytes()
    with pytest.raises(TypeError):
        keys.save_keys(path, [keys.Key("b", "0" * 64, ("read",), created=object())])  # type: ignore[arg-type]
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_file_with_a_limited_key_has_the_schema_that_older_gateways_refuse(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for models, schema in (((), 2), (("photos", "pets"), 3)):
        _, key = keys.make_key("alice", ["predict"], models=models)
        keys.save_keys(path, [key])
        assert json.loads(path.read_text(encoding="utf-8"))["schema"] == schema
        assert keys.load_keys(path) == (key,)
