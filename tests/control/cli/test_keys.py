"""`gradserve keys` and `gradserve config`: secrets are shown once or never."""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from control.cli.keys import changing, read_keys
from control.cli.main import app
from control.errors import BadSetting, KeysUnusable
from gateway.auth.callers import Callers
from gateway.auth.keys import Key, digest, load_keys
from gateway.settings import Settings


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("AGENT_", "GATEWAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run():
    def run(*arguments):
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def test_make_prints_the_secret_alone_and_stores_only_its_digest(run, tmp_path):
    made = run("keys", "make", "alice", "--scope", "predict", "--scope", "read")
    secret = made.stdout.strip()
    assert re.fullmatch(r"gs_[\w-]{43}", secret)
    assert "GATEWAY_KEYS_FILE=" in made.stderr
    path = tmp_path / "keys.json"
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = load_keys(path)
    assert (key.name, key.sha256, key.scopes) == ("alice", digest(secret), ("predict", "read"))


def test_list_shows_names_scopes_and_dates_but_no_digest(run):
    run("keys", "make", "alice")
    run("keys", "make", "bob", "--scope", "read")
    shown = run("keys", "list").stdout
    assert re.search(r"alice +[0-9a-f]{8}  \d{4}-\d\d-\d\d  predict explain\n", shown)
    assert re.search(r"bob +[0-9a-f]{8}  \d{4}-\d\d-\d\d  read\n", shown)
    assert not re.search(r"[0-9a-f]{64}", shown)
    assert [row["name"] for row in json.loads(run("keys", "list", "--json").stdout)] == ["alice", "bob"]


def test_revoke_removes_one_key_and_a_running_gateway_follows(run, tmp_path):
    run("keys", "make", "alice")
    run("keys", "make", "bob")
    callers = Callers(Settings(keys_file=tmp_path / "keys.json"))
    run("keys", "revoke", "alice")
    callers.refresh_keys()
    assert [key.name for key in callers._keys] == ["bob"]


def test_rotate_adds_a_key_and_lets_the_old_one_expire(run, tmp_path):
    first = run("keys", "make", "alice", "--scope", "read", "--quota", "600/minute").stdout.strip()
    rotated = run("keys", "rotate", "alice", "--overlap", "12h")
    second = rotated.stdout.strip()
    old, new = load_keys(tmp_path / "keys.json")
    assert [key.sha256 for key in (old, new)] == [digest(first), digest(second)]
    assert (old.scopes, old.quota, new.expires) == (new.scopes, new.quota, "")
    left = datetime.fromisoformat(old.expires) - datetime.now(UTC)
    assert timedelta(hours=11.9) < left <= timedelta(hours=12)
    assert f"the old key {old.id} works until {old.expires}" in rotated.stderr
    assert re.search(
        rf"alice  {old.id} .* read  600/minute  expires {re.escape(old.expires)}", run("keys", "list").stdout
    )
    callers = Callers(Settings(keys_file=tmp_path / "keys.json"))
    assert {callers._find(secret) for secret in (first, second)} == {old, new}


def test_a_compromised_key_is_rotated_without_overlap(run, tmp_path):
    run("keys", "make", "alice")
    run("keys", "rotate", "alice", "--overlap", "0d")
    old, new = load_keys(tmp_path / "keys.json")
    assert (old.is_expired(), new.is_expired()) == (True, False)
    assert [row["expired"] for row in json.loads(run("keys", "list", "--json").stdout)] == [True, False]
    run("keys", "rotate", "alice")
    assert load_keys(tmp_path / "keys.json")[0].id == new.id, "the expired key is removed"


def test_one_of_two_keys_of_a_name_is_revoked_by_its_id(run, tmp_path):
    run("keys", "make", "alice")
    run("keys", "rotate", "alice")
    old, new = load_keys(tmp_path / "keys.json")
    run("keys", "revoke", "alice", "--id", old.id)
    assert load_keys(tmp_path / "keys.json") == (new,)


def test_edit_sets_and_removes_quota_and_expiry(run, tmp_path):
    run("keys", "make", "alice", "--expires", "2999-12-31", "--quota", "5/second")
    (key,) = load_keys(tmp_path / "keys.json")
    assert (key.expires, key.quota) == ("2999-12-31T00:00:00+00:00", "5/second")
    run("keys", "edit", "alice", "--expires", "none", "--quota", "none", "--scope", "read")
    (changed,) = load_keys(tmp_path / "keys.json")
    assert changed == Key("alice", key.sha256, ("read",), key.created)


def test_a_key_is_limited_to_models_keeps_them_when_it_is_rotated_and_edit_changes_and_removes_them(run, tmp_path):
    run("keys", "make", "alice", "--model", "photos", "--model", "pets")
    run("keys", "rotate", "alice", "--overlap", "0d")
    assert [key.models for key in load_keys(tmp_path / "keys.json")] == [("photos", "pets")] * 2
    assert "only photos pets" in run("keys", "list").stdout
    run("keys", "edit", "alice", "--model", "pets")
    assert load_keys(tmp_path / "keys.json")[-1].models == ("pets",)
    assert json.loads(run("keys", "list", "--json").stdout)[-1]["models"] == ["pets"]
    run("keys", "edit", "alice", "--model", "none")
    assert load_keys(tmp_path / "keys.json")[-1].models == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("make", "bob", "--model", "a/b"), "write a model's name"),
        (("make", "alice"), "already exists: run `gradserve keys rotate alice`"),
        (("make", "bob", "--quota", "often"), "write like 600/minute"),
        (("make", "bob", "--expires", "soon"), "write 90d"),
        (("make", "bob", "--expires", "2020-01-01"), "has passed"),
        (("rotate", "nobody"), "no key named nobody"),
        (("edit", "nobody", "--quota", "none"), "no key named nobody"),
        (("edit", "alice", "--scope", "admin"), "use one or more of predict"),
        (("revoke", "alice", "--id", "0"), "no key named alice with the id 0"),
        (("make", "a b"), "does not match"),
        (("make", "bob", "--scope", "admin"), "use one or more of predict"),
        (("revoke", "nobody"), "no key named nobody"),
    ],
)
def test_an_invalid_change_is_refused_and_the_file_stays(run, tmp_path, arguments, sentence):
    run("keys", "make", "alice")
    before = (tmp_path / "keys.json").read_bytes()
    with pytest.raises(KeysUnusable, match=sentence):
        run("keys", *arguments)
    assert (tmp_path / "keys.json").read_bytes() == before


def test_a_broken_file_is_left_as_it_is(run, tmp_path):
    (tmp_path / "keys.json").write_text("{")
    with pytest.raises(KeysUnusable, match="no JSON"):
        run("keys", "make", "alice")
    assert (tmp_path / "keys.json").read_text() == "{"


def test_the_file_option_names_another_key_file(run, tmp_path):
    run("keys", "make", "alice", "--file", str(tmp_path / "deep" / "k.json"))
    assert [key.name for key in read_keys(tmp_path / "deep" / "k.json")] == ["alice"]


def test_two_changes_at_once_lose_no_key(tmp_path):
    path = tmp_path / "keys.json"

    def add(number):
        with changing(path) as stored:
            stored.append(Key(f"key{number}", f"{number:064x}", ("read",)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(24)))
    assert {key.name for key in load_keys(path)} == {f"key{number}" for number in range(24)}


def test_config_shows_every_setting_with_its_source_and_no_secret(run, monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("GATEWAY_PORT=8123\n")
    monkeypatch.setenv("GATEWAY_PORT", "8123")  # as `gradserve` reads it from .env
    monkeypatch.setenv("AGENT_WORKERS", "3")
    monkeypatch.setenv("GATEWAY_KEYS", "alice:" + "ab" * 32 + ":read,gs_a-secret-in-the-wrong-place")
    monkeypatch.setenv("GATEWAY_RATE_STORE", "redis://user:hunter2@store:6379/0?password=hunter3")
    monkeypatch.setenv("GATEWAY_OTLP_ENDPOINT", "http://token@collector:4318")
    rows = {row["name"]: (row["value"], row["source"]) for row in json.loads(run("config", "--json").stdout)}
    assert rows["GATEWAY_PORT"] == ("8123", ".env")
    assert rows["AGENT_WORKERS"] == ("3", "environment")
    assert rows["GATEWAY_WORKERS"] == ("1", "default")
    assert rows["GATEWAY_KEYS"] == ("alice:****,****", "environment")
    assert rows["GATEWAY_RATE_STORE"][0] == "redis://****@store:6379/0?password=****"
    assert rows["GATEWAY_OTLP_ENDPOINT"][0] == "http://****@collector:4318"
    shown = run("config").stdout
    assert "GATEWAY_PORT=8123" in shown
    assert not re.search("hunter|abab|wrong-place|token@", shown)


def test_config_refuses_an_unknown_variable_with_the_nearest_name(run, monkeypatch):
    monkeypatch.setenv("GATEWAY_PROT", "1")
    with pytest.raises(BadSetting, match="GATEWAY_PORT"):
        run("config")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [(("rotate", "alice", "--overlap", "none"), "--overlap a time like 7d"), (("edit", "alice"), "nothing to change")],
)
def test_a_change_that_would_change_nothing_is_refused(run, tmp_path, arguments, remedy):
    run("keys", "make", "alice")
    before = (tmp_path / "keys.json").read_bytes()
    refused = CliRunner().invoke(app, ["keys", *arguments])
    assert refused.exit_code == 2
    assert remedy in " ".join(refused.stderr.replace("│", " ").split())
    assert (tmp_path / "keys.json").read_bytes() == before
