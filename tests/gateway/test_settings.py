"""Wrong settings are refused at the start with one sentence; the table in the docs is generated from the fields."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gateway.settings import VERSION, Settings, SettingsError, load_settings

ROOT = Path(__file__).parents[2]


def test_an_unknown_name_is_refused_with_the_nearest_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PROT", "80")
    with pytest.raises(SettingsError, match=r"GATEWAY_PROT is no setting.*GATEWAY_PORT"):
        load_settings()


def test_an_impossible_value_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "http")
    with pytest.raises(SettingsError, match=r"GATEWAY_PORT = 'http'"):
        load_settings()


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_AGENTS", "http://a:1/, http://b:2")
    assert load_settings().agents == ("http://a:1", "http://b:2")


def test_the_plan_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().plan == Path(".gradserve/plan.json")
    monkeypatch.setenv("GRADSERVE_HOME", "/srv/home")
    assert load_settings().plan == Path("/srv/home/plan.json")


def test_the_plan_may_be_a_config_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PLAN", "kubernetes:models/plan")
    assert str(load_settings().plan) == "kubernetes:models/plan"
    monkeypatch.setenv("GATEWAY_PLAN", "kubernetes:Models/plan")
    with pytest.raises(SettingsError, match="write like kubernetes:NAMESPACE/NAME"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_PORT", "tcp://10.0.0.1:8000"),
        ("GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("GATEWAY_SERVICE_PORT_HTTP", "8000"),
        ("GATEWAY_CANARY_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_a_variable_that_kubernetes_sets_for_a_service_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"{name} is no setting: Kubernetes sets it .*enableServiceLinks: false"):
        load_settings()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert not Settings(host=host).asks_for_keys


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_another_address_without_keys_does_not_start(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("GATEWAY_HOST", host)
    with pytest.raises(SettingsError, match="GATEWAY_AUTH=off"):
        load_settings()


def test_another_address_starts_with_keys_or_with_auth_off() -> None:
    assert Settings(host="0.0.0.0", keys=("a:" + "0" * 64 + ":read",)).asks_for_keys
    assert not Settings(host="0.0.0.0", auth="off").asks_for_keys


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GATEWAY_PROT", "1", "GATEWAY_PORT"),
        ("GATEWAY_KEYS_FILE", "/nope", "does not exist"),
        ("GATEWAY_HOST", "::", "off"),
        ("GUNICORN_CMD_ARGS", "--bind 0.0.0.0:0", "0.0.0.0 is reachable by other machines"),
    ],
)
def test_gunicorn_ends_with_one_sentence(name: str, value: str, sentence: str) -> None:
    command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"]
    environ = {**os.environ, name: value}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_equals_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION
