import os

import pytest

from control.errors import BadSetting
from control.settings import local_url, read_agent_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AGENT_"):
            monkeypatch.delenv(name)


def test_a_mistyped_name_is_refused_with_the_nearest_known_one(monkeypatch):
    monkeypatch.setenv("AGENT_WORKER", "2")
    with pytest.raises(BadSetting, match="AGENT_WORKER is no setting; the nearest known one is AGENT_WORKERS"):
        read_agent_settings()


def test_an_invalid_value_is_refused_with_its_variable(monkeypatch):
    monkeypatch.setenv("AGENT_PORT", "99999")
    with pytest.raises(BadSetting, match=r"^AGENT_PORT = '99999': "):
        read_agent_settings()


def test_the_plan_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))
    assert read_agent_settings().plan == tmp_path / "plan.json"


def test_the_inference_url_has_the_advertised_host(monkeypatch):
    monkeypatch.setenv("AGENT_ADVERTISED_HOST", "replica-1")
    assert read_agent_settings().inference_url == "http://replica-1:9101"
    monkeypatch.setenv("AGENT_ADVERTISED_HOST", "fd00::7")
    assert read_agent_settings().inference_url == "http://[fd00::7]:9101"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fd00::1", "http://[fd00::1]:80"),
        ("192.0.2.1", "http://192.0.2.1:80"),
    ],
)
def test_local_url_reaches_a_server_that_listens_on_the_host(host, url):
    assert local_url(host, 80) == url
