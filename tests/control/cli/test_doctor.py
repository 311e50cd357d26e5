"""`gradserve doctor`: findings about the settings of a machine."""

import tempfile

import pytest

from contracts.plan import Plan, Release
from control.cli.doctor import examine
from control.release.plan_store import PlanStore


@pytest.fixture
def find(tmp_path, monkeypatch):
    """`find(about, **variables)`: the finding with these variables in the environment, None if there is none."""
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))

    def find(about, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return next((found for found in examine(tmp_path, [], [], tmp_path) if found.about == about), None)

    return find


@pytest.mark.parametrize("proxies", ["*", "10.0.0.1, *", "0.0.0.0/0"])
def test_trusting_every_proxy_is_a_bad_finding(find, proxies):
    found = find("proxies", GATEWAY_TRUSTED_PROXIES=proxies)
    assert (found.severity, "addresses of your proxies" in found.remedy) == ("bad", True)


def test_named_proxies_give_no_finding(find):
    assert find("proxies", GATEWAY_TRUSTED_PROXIES="10.0.0.1,10.1.0.0/16") is None


def test_a_folder_in_which_torchserve_cannot_run_is_a_bad_finding(find, tmp_path):
    with tempfile.TemporaryDirectory(prefix="g") as short:
        assert find("temporary files", GRADSERVE_HOME=short).text == f"{short}/run"
    found = find("temporary files", AGENT_TEMP=str(tmp_path / ("x" * 90)))
    assert (found.severity, "AGENT_TEMP" in found.text) == ("bad", True)


def test_an_archive_that_agents_fetch_is_no_problem_if_this_machine_lacks_it(find, tmp_path):
    release = Release("1.0", "m-1.0.mar", "0" * 64, source="https://models.example/m-1.0.mar?token=secret")
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", release), "first plan")
    found = find("archive")
    assert (found.severity, found.text) == ("good", "m-1.0.mar: agents fetch it from https://models.example/m-1.0.mar")
