"""`gradserve up` as a whole: what it tells while it loads, breaks and stops."""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.server


def test_health_tells_within_three_seconds_that_a_worker_died_and_when_it_is_back(stack, until):
    took = []
    while not took or (took[-1] >= 3 and len(took) < 3):  # again where the machine stood still
        until(lambda: stack.health().json()["status"] == "ok", 30)
        victim = stack.worker_pids("cifar10")[0]
        os.kill(victim, signal.SIGKILL)
        took.append(until(lambda: stack.health().json()["status"] == "degraded", 15))
        until(lambda: stack.health().json()["status"] == "ok", 90)
        assert victim not in stack.worker_pids("cifar10")
    assert took[-1] < 3


def test_torchserve_that_dies_comes_back_verified(stack, until):
    before = stack.status()["torchserve"]
    os.kill(before["pid"], signal.SIGKILL)
    until(lambda: stack.health().status_code == 503, 5)
    until(lambda: stack.health().json()["status"] == "ok", 120)
    assert stack.status()["torchserve"]["restarts"] == before["restarts"] + 1
    # Router without traffic, which earlier tests left, are verified after the stable one.
    until(lambda: all(version["verified"] for version in stack.status()["versions"]), 60)


def test_gateway_that_dies_is_started_again(stack, until):
    (before,) = gunicorns(stack)
    os.kill(before, signal.SIGKILL)
    until(lambda: gunicorns(stack) not in ([], [before]), 30)
    until(lambda: stack.health().json()["status"] == "ok", 30)


def test_workers_never_see_secrets(stack):
    pids = stack.worker_pids("cifar10")
    assert pids
    for pid in pids:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        names = {entry.split(b"=")[0].decode() for entry in environ.split(b"\0") if entry}
        assert not [name for name in names if name.startswith(("GATEWAY_", "AGENT_", "AWS_", "MLFLOW_"))]
        assert "OMP_NUM_THREADS" in names


def test_status_prints_one_json_document_and_exits_with_zero_when_all_is_well(stack):
    answer = stack.command("status", "--json")
    assert answer.returncode == 0
    assert httpx.Response(200, text=answer.stdout).json()["ok"] is True


def test_other_commands_find_the_stack_by_its_home_alone(stack):
    ports = {"PORT", *(name for name in stack.environment if name.startswith("AGENT_") and name.endswith("_PORT"))}
    alone = replace(stack, environment={name: v for name, v in stack.environment.items() if name not in ports})
    view = json.loads(alone.command("status", "--json").stdout)
    assert [(found["url"], "error" in found) for found in view["gateways"]] == [(stack.gateway, False)]
    assert (view["ok"], view["counted_error"]) == (True, None)
    versions = alone.command("versions", "--json")
    assert (versions.returncode, json.loads(versions.stdout)[0]["agents"]) == (0, {stack.agent: "ready"})
    findings = json.loads(alone.command("doctor", "--json").stdout)
    assert {finding["about"] for finding in findings} >= {f"agent {stack.agent}", f"gateway {stack.gateway}"}


def test_taken_ports_are_reported_before_anything_starts(make_stack, model_source):
    other = make_stack()
    with socket.socket() as first, socket.socket() as second:
        for probe, name in ((first, "PORT"), (second, "AGENT_INFERENCE_PORT")):
            probe.bind(("127.0.0.1", int(other.environment[name])))
            probe.listen()
        answer = other.command("up", "--source", str(model_source))
    assert answer.returncode == 1
    assert other.environment["PORT"] in answer.stderr
    assert other.environment["AGENT_INFERENCE_PORT"] in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not other.home.exists()


def test_loading_is_503_ready_is_200_and_term_leaves_no_process_behind(make_stack, model_source, until):
    other = make_stack()
    other.start(model_source)
    until(lambda: other.health().status_code == 503, 60, other)
    assert httpx.get(f"{other.gateway}/readyz").status_code == 503
    assert httpx.get(f"{other.gateway}/livez").status_code == 200
    other.wait_until_ready()
    assert other.health().status_code == 200
    other.process.send_signal(signal.SIGTERM)
    assert other.process.wait(40) == 0
    assert other.processes() == {}


def test_nothing_is_orphaned_when_up_itself_is_killed(make_stack, model_source, until):
    other = make_stack()
    other.start(model_source)
    until(lambda: other.status()["torchserve"]["pid"] is not None, 60, other)
    other.process.kill()
    other.process.wait()
    until(lambda: other.processes() == {}, 30)


def test_a_part_that_keeps_dying_ends_everything_with_the_reason(make_stack, model_source):
    other = make_stack(GATEWAY_WORKER="2")
    started = time.monotonic()
    other.start(model_source)
    assert other.process.wait(90) == 1
    assert time.monotonic() - started < 60
    assert "gateway died 3 times" in other.said()
    assert "GATEWAY_WORKER is no setting" in other.said()
    assert other.processes() == {}


def gunicorns(stack) -> list[int]:
    """Gunicorn's masters: they lead their process groups, workers do not."""
    found = []
    for pid, command in stack.processes().items():
        with contextlib.suppress(ProcessLookupError):
            if "gunicorn" in command and os.getpgid(pid) == pid:
                found.append(pid)
    return found


def test_help_of_every_command_says_what_it_does_without_starting_anything(stack):
    for name in ("up", "agent", "status", "train", "evaluate", "package"):
        answer = stack.command(name, "--help")
        assert answer.returncode == 0, name
        assert len(answer.stdout.splitlines()) > 5, name
