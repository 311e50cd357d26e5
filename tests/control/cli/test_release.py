"""The commands that move versions: whom they ask, what they refuse, and what they print."""

import json
import os

import pytest
import typer
from typer.testing import CliRunner

from contracts.plan import Canary, Plan, Release
from control.cli.main import app
from control.cli.release import agent_addresses, gateway_addresses, is_new_model, model_store
from control.release.plan_store import PlanStore
from control.stack.running import RunningStack, announce

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("AGENT_", "GATEWAY_", "GRADSERVE_", "KUBERNETES_", "MLFLOW_")) or name == "PORT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path):
    """A plan whose canary is 2.0."""
    store, canary = PlanStore(tmp_path), Canary("2.0", "m-2.0.mar", "2" * 64, 1, share=10)
    with store.lock("test"):
        store.write(Plan(0, "m", Release("1.0", "m-1.0.mar", "1" * 64, 1), canary=canary), "first")
    return store


def run(*arguments):
    return CliRunner().invoke(app, [*arguments, "--agents", NOWHERE], catch_exceptions=False)


def test_the_named_addresses_are_asked_else_the_running_stacks_else_this_machines(monkeypatch, tmp_path):
    assert agent_addresses("http://127.0.0.1:1/, http://127.0.0.1:2") == ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert (agent_addresses(""), gateway_addresses("")) == (["http://127.0.0.1:9100"], ["http://127.0.0.1:8000"])
    monkeypatch.setenv("AGENT_PORT", "9200")
    monkeypatch.setenv("GATEWAY_PORT", "8200")
    assert (agent_addresses(""), gateway_addresses("")) == (["http://127.0.0.1:9200"], ["http://127.0.0.1:8200"])
    with announce(tmp_path, RunningStack(os.getpid(), "http://127.0.0.1:8300", "http://127.0.0.1:9300")):
        assert (agent_addresses(""), gateway_addresses("")) == (["http://127.0.0.1:9300"], ["http://127.0.0.1:8300"])


def test_a_host_name_that_cannot_be_resolved_stays_so_that_it_is_reported():
    unknown = "http://no-such-host.invalid:9100"
    assert agent_addresses(f"{unknown},{NOWHERE}") == [unknown, NOWHERE]


def test_an_empty_list_of_addresses_is_refused():
    with pytest.raises(typer.BadParameter, match="names no address"):
        gateway_addresses(" , ")


def test_a_model_that_the_plan_does_not_serve_is_new(store):
    assert is_new_model("photos")
    assert not is_new_model("m")
    assert not is_new_model(None)


def test_without_a_plan_no_model_is_added_on_one_machine():
    assert not is_new_model("photos")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("deploy", "2.0", "--canary", "10", "--shadow"), "choose one of --canary, --shadow and --stable"),
        (("deploy", "2.0", "--shadow", "--stable"), "choose one of --canary, --shadow and --stable"),
        (("deploy", "p-1.0.mar", "--model", "photos", "--canary", "10"), "leave out --canary, --shadow, --gate"),
        (("deploy", "2.0", "--canary", "101"), "less than or equal to 100"),
        (("scale", "2.0", "-1"), "-1"),
    ],
)
def test_options_that_contradict_are_refused_without_a_change(store, arguments, reason):
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert reason in " ".join(refused.stderr.replace("│", " ").split())
    assert store.read().revision == 1


def test_json_is_the_plan_alone_and_progress_goes_to_the_standard_error(store):
    done = run("rollback", "--json")
    assert done.exit_code == 0
    plan = json.loads(done.stdout)
    assert (plan["revision"], plan["stable"]["version"], plan["canary"]) == (2, "1.0", None)
    assert "rollback" in done.stderr
    assert store.read().canary is None


def test_without_json_the_plan_is_one_line(store):
    lines = run("rollback").stdout.splitlines()
    assert "1.0" in lines[-1]
    assert not lines[-1].startswith("{")


def test_the_model_store_is_that_of_the_agents(monkeypatch, tmp_path):
    assert str(model_store()) == "model_store"
    monkeypatch.setenv("AGENT_MODEL_STORE", str(tmp_path / "archives"))
    assert model_store() == tmp_path / "archives"
