"""`status`, `versions` and `doctor`: the addresses they ask, their exit codes, and output that is never cut."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contracts import status as agent_status
from contracts.plan import Plan, Release
from contracts.status import AgentStatus, Pool, ServerStatus, VersionStatus
from control.cli.main import app
from control.cli.status import columns, output
from control.release.plan_store import PlanStore
from control.stack.running import RunningStack, announce, find_running
from gateway.auth.keys import make_key, save_keys

NOWHERE = "http://127.0.0.1:9"
REASON = "a worker ended while it loaded, with a sentence that is longer than a line of eighty columns: no such file"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("AGENT_", "GATEWAY_", "GRADSERVE_")) or name in {"PORT", "COLUMNS"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", Release("1.0", "m-1.0.mar", "0" * 64)), "first")


@pytest.fixture
def run():
    def run(*arguments, code=0):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def agent(serve):
    """The address of an agent that serves the plan's stable version."""
    version = VersionStatus(
        "m",
        "1.0",
        "stable",
        "ready",
        routable=True,
        predict=Pool(1, 1, 0, 10),
        explain=Pool(1, 1, 0, 10),
        reason=REASON,
    )
    server = ServerStatus("running", 0, "http://torchserve:8080")
    status = AgentStatus(0, draining=False, torchserve=server, versions=(version,), plan_revision=1)
    return serve(lambda _: (200, json.dumps(agent_status.dump(replace(status, observed_at=time.time()))).encode()))


@pytest.fixture
def gateway(serve):
    """The address of a healthy gateway."""
    return serve(lambda _: (200, json.dumps({"status": "ok", "reasons": []}).encode()))


def test_the_running_stack_is_asked_without_options_for_its_addresses(run, agent, gateway, tmp_path):
    with announce(tmp_path, RunningStack(os.getpid(), gateway, agent)):
        view = json.loads(run("status", "--json").stdout)
        assert [found["url"] for found in (*view["agents"], *view["gateways"])] == [agent, gateway]
        assert json.loads(run("versions", "--json").stdout)[0]["agents"] == {agent: "ready"}
        findings = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
        about = {finding["about"]: finding["severity"] for finding in findings}
        assert (about[f"agent {agent}"], about[f"gateway {gateway}"]) == ("good", "good")
    assert find_running(tmp_path) is None


def test_the_exit_code_shows_if_an_agent_or_a_gateway_cannot_be_reached(run, agent, gateway):
    run("status", "--agents", agent, "--gateways", gateway)
    result = run("status", "--agents", agent, "--gateways", NOWHERE, code=3)
    assert f"gateway   {NOWHERE}  does not answer (ConnectError)" in result.stdout
    run("status", "--agents", NOWHERE, "--gateways", gateway, code=1)
    run("versions", "--agents", agent)
    result = run("versions", "--agents", NOWHERE, code=3)
    assert f"agent {NOWHERE} does not answer" in result.stderr
    assert "1.0" in result.stdout
    result = run("doctor", "--agents", agent, "--gateways", NOWHERE, code=1)
    assert f"gateway {NOWHERE}" in result.stdout


def test_output_to_a_pipe_is_not_cut(agent, gateway, tmp_path):
    for command in ("status", "doctor"):
        piped = subprocess.run(
            [sys.executable, "-m", "control.cli.main", command, "--agents", agent, "--gateways", gateway],
            env=os.environ | {"COLUMNS": "60", "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        if command == "status":
            assert any(REASON in line for line in piped.stdout.splitlines()), piped.stdout
        assert "…" not in piped.stdout
        missing = "archive m-1.0.mar: cannot be read, there is no such file"
        assert command == "status" or any(missing in line for line in piped.stdout.splitlines()), piped.stdout


def test_a_narrow_terminal_folds_cells_and_cuts_none(capsys):
    console = output()
    console.width = 20
    table = columns("v", "sha256")
    table.add_row("1.0", "0123456789" * 4)
    console.print(table)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "".join(printed.split()[3:]) == "0123456789" * 4


@pytest.mark.parametrize("command", [("status",), ("versions",), ("doctor",), ("prune",), ("keys", "list")])
def test_the_help_of_json_names_every_field(command, monkeypatch, tmp_path):
    save_keys(tmp_path / "keys.json", [make_key("alice", ["read"])[1]])
    printed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    help_text = " ".join(CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "400"}).stdout.split())
    _, _, described = help_text.partition("--json ")
    assert printed
    for field in printed[0] if isinstance(printed, list) else printed:
        assert field in described, field


def test_doctor_names_a_key_that_expires_soon_unless_it_is_being_rotated(run, monkeypatch, tmp_path):
    monkeypatch.setenv("GATEWAY_KEYS_FILE", str(tmp_path / "keys.json"))
    for name in ("alice", "bob"):
        run("keys", "make", name, "--expires", "2d")
    run("keys", "rotate", "bob", "--expires", "90d")
    findings = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    notes = [finding for finding in findings if finding["about"] == "keys" and finding["severity"] == "note"]
    assert [finding["text"].partition(" at ")[0] for finding in notes] == ["alice expires"]
    assert notes[0]["remedy"] == "gradserve keys rotate alice --expires 90d"
