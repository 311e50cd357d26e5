"""`gradserve keys` and `gradserve config`: secrets are shown once or never."""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from control.cli import app
from control.errors import BadSetting, KeysUnusable
from control.gateway_commands import changing, read_keys
from gateway.callers import Callers
from gateway.keys import Key, digest, load_keys
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


def test_list_tells_names_scopes_and_days_but_no_digest(run):
    run("keys", "make", "alice")
    run("keys", "make", "bob", "--scope", "read")
    shown = run("keys", "list").stdout
    assert re.search(r"alice +\d{4}-\d\d-\d\d  predict explain\n", shown)
    assert re.search(r"bob +\d{4}-\d\d-\d\d  read\n", shown)
    assert not re.search(r"[0-9a-f]{64}", shown)
    assert [row["name"] for row in json.loads(run("keys", "list", "--json").stdout)] == ["alice", "bob"]


def test_revoke_takes_one_key_back_and_a_running_gateway_follows(run, tmp_path):
    run("keys", "make", "alice")
    run("keys", "make", "bob")
    callers = Callers(Settings(keys_file=tmp_path / "keys.json"))
    run("keys", "revoke", "alice")
    callers.refresh_keys()
    assert [key.name for key in callers._keys] == ["bob"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("make", "alice"), "already"),
        (("make", "a b"), "does not match"),
        (("make", "bob", "--scope", "admin"), "use one or more of predict"),
        (("revoke", "nobody"), "no key named nobody"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(run, tmp_path, arguments, sentence):
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


def test_the_file_may_lie_elsewhere(run, tmp_path):
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


def test_config_tells_every_setting_with_its_source_and_no_secret(run, monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("GATEWAY_PORT=8123\n")
    monkeypatch.setenv("GATEWAY_PORT", "8123")  # as `gradserve` takes it from .env
    monkeypatch.setenv("AGENT_WORKERS", "3")
    monkeypatch.setenv("GATEWAY_KEYS", "alice:" + "ab" * 32 + ":read,gs_a-secret-in-the-wrong-place")
    monkeypatch.setenv("GATEWAY_RATE_STORE", "redis://user:hunter2@store:6379/0?password=hunter3")
    monkeypatch.setenv("GATEWAY_OTLP_ENDPOINT", "http://token@collector:4318")
    rows = {row["name"]: (row["value"], row["source"]) for row in json.loads(run("config", "--json").stdout)}
    assert rows["GATEWAY_PORT"] == ("8123", ".env")
    assert rows["AGENT_WORKERS"] == ("3", "environment")
    assert rows["GATEWAY_WORKERS"] == ("2", "default")
    assert rows["GATEWAY_KEYS"] == ("alice:****,****", "environment")
    assert rows["GATEWAY_RATE_STORE"][0] == "redis://****@store:6379/0?password=****"
    assert rows["GATEWAY_OTLP_ENDPOINT"][0] == "http://****@collector:4318"
    shown = run("config").stdout
    assert "GATEWAY_PORT=8123" in shown
    assert not re.search("hunter|abab|wrong-place|token@", shown)


def test_config_says_what_is_wrong(run, monkeypatch):
    monkeypatch.setenv("GATEWAY_PROT", "1")
    with pytest.raises(BadSetting, match="GATEWAY_PORT"):
        run("config")
