"""`gradserve up` as a whole: what it tells while it loads, breaks and stops."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]

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


@pytest.mark.long
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


def test_workers_that_predict_by_openvino_do_not_load_torch(stack):
    for pid in stack.worker_pids("cifar10"):
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "libopenvino" in libraries
        assert "libtorch" not in libraries


def test_torchserve_listens_on_two_ports_and_manages_by_a_socket_for_its_own_user_alone(stack):
    java = psutil.Process(stack.status()["torchserve"]["pid"])
    ports = {held.laddr.port for held in java.net_connections("tcp") if held.status == psutil.CONN_LISTEN}
    assert ports == {int(stack.environment[f"AGENT_{name}_PORT"]) for name in ("INFERENCE", "METRICS")}
    folder = stack.run_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()
    if os.getuid() == 0:  # only root can become another user, and try
        code = "import os, socket, sys; os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        command = [sys.executable, "-c", code, str(folder / "management.sock")]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "PermissionError" in answer.stderr


def test_an_entry_that_somebody_else_registered_is_removed_and_reported(stack, until):
    (ours, *_) = (stack.run_folder() / "store").glob("*.mar")
    with stack.management() as client:
        intruder = {"url": ours.name, "model_name": "intruder", "initial_workers": "0", "synchronous": "true"}
        assert client.post("/models", params=intruder).status_code == 200
        until(lambda: client.get("/models/intruder").status_code == 404, 10, stack)
        names = {entry["modelName"] for entry in client.get("/models").json()["models"]}
    until(lambda: any("intruder" in entry for entry in stack.status()["torchserve"]["removed_entries"]), 5)
    assert names == {"cifar10", "cifar10-explain"}
    assert "intruder" in str(json.loads(stack.command("status", "--json").stdout)["drift"])


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
    for name, use in (("PORT", "the gateway"), ("AGENT_INFERENCE_PORT", "TorchServe's inference")):
        assert f"port {other.environment[name]} ({use}, moved by {name})" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not other.home.exists()


def test_a_folder_in_which_torchserve_cannot_run_is_reported_before_anything_starts(make_stack, model_source, tmp_path):
    other = make_stack(AGENT_TEMP=str(tmp_path / ("x" * 90)))
    answer = other.command("up", "--source", str(model_source))
    assert answer.returncode == 1
    assert "set AGENT_TEMP" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not other.home.exists()


def test_loading_is_503_ready_is_said_when_both_printed_lines_work_and_term_leaves_no_process_behind(
    make_stack, model_source, read_only_code, add_code, until, tmp_path
):
    """A second stack by PORT alone, also where the first default of its private ports is taken."""
    other = make_stack(PYTHONDONTWRITEBYTECODE="1")
    for name in [name for name in other.environment if name.startswith("AGENT_") and name.endswith("_PORT")]:
        del other.environment[name]
    files = set(read_only_code.rglob("*"))
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # somebody else holds it
            held.enter_context(socket.create_server(("127.0.0.1", 9100)))
        other.start(model_source, read_only_code)
        until(lambda: other.health().status_code == 503, 60, other)
    assert httpx.get(f"{other.gateway}/readyz").status_code == 503
    assert httpx.get(f"{other.gateway}/livez").status_code == 200
    # Between the two registrations, of predictions and explanations, the archive becomes another one.
    until(lambda: other.management_log.exists() and "POST" in other.management_log.read_text(), 60, other)
    (archive,) = other.model_store.glob("*.mar")
    right = hashlib.sha256(zipfile.ZipFile(archive).read("image_handler.py")).hexdigest()
    add_code(archive, "# other code").replace(archive)
    until(lambda: f"\nready: {other.gateway}\n" in other.said(), 180, other)
    lines = [line for line in other.said().splitlines() if line.startswith("  curl -f ")]
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run(
            line.replace("@tests", f"@{ROOT}/tests"), shell=True, cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert httpx.get(f"{other.gateway}/readyz").status_code == 200
    assert other.health().status_code == 200
    unpacked = other.run_folder().glob("tmp/models/*/image_handler.py")
    loaded = [hashlib.sha256(path.read_bytes()).hexdigest() for path in unpacked]
    assert loaded == [right, right]
    assert set(read_only_code.rglob("*")) == files
    other.process.send_signal(signal.SIGTERM)
    assert other.process.wait(40) == 0
    assert other.processes() == {}
    assert list(Path(other.environment["AGENT_TEMP"]).glob("ts-*")) == []


def test_nothing_is_orphaned_when_up_itself_is_killed(make_stack, model_source, until):
    other = make_stack()
    other.start(model_source)
    until(lambda: other.status()["torchserve"]["pid"] is not None, 60, other)
    other.process.kill()
    other.process.wait()
    until(lambda: other.processes() == {}, 30)


def test_a_setting_that_the_gateway_refuses_is_reported_before_anything_starts(make_stack, model_source):
    other = make_stack(GATEWAY_KEYS="alice")
    answer = other.command("up", "--source", str(model_source))
    assert answer.returncode == 1
    assert answer.stderr.startswith("gradserve: GATEWAY_KEYS: ")
    assert "Traceback" not in answer.stderr
    assert not other.home.exists()


@pytest.mark.long
def test_a_part_that_keeps_dying_ends_everything_with_the_reason(make_stack, model_source):
    other = make_stack(GATEWAY_FEEDBACK_FILE="/proc/nowhere/feedback.db")
    started = time.monotonic()
    other.start(model_source)
    assert other.process.wait(90) == 1
    assert time.monotonic() - started < 60
    assert "gateway died 3 times" in other.said()
    assert "GATEWAY_FEEDBACK_FILE" in other.said()
    assert other.processes() == {}


def gunicorns(stack) -> list[int]:
    """Gunicorn's masters: they lead their process groups, workers do not."""
    found = []
    for pid, command in stack.processes().items():
        with contextlib.suppress(ProcessLookupError):
            if "gunicorn" in command and os.getpgid(pid) == pid:
                found.append(pid)
    return found


@pytest.mark.long
def test_a_worker_that_torchserve_gives_up_is_replaced_while_the_others_serve(stack, until):
    def workers():
        with stack.management() as client:
            return client.get("/models/cifar10/all").json()[0]["workers"]

    until(lambda: stack.health().json()["status"] == "ok", 90)
    victim, served = workers()[0]["id"], set()
    java = psutil.Process(stack.status()["torchserve"]["pid"])

    def replaced():
        (pid,) = (worker["pid"] for worker in workers() if worker["id"] == victim)
        for child in java.children():  # TorchServe names dead processes too, whose number may be another one's by now
            if child.pid == pid:
                child.kill()
        served.add(stack.status()["versions"][0]["predict"]["ready"] > 0)
        return len(workers()) > 2 and stack.health().json()["status"] == "ok"

    took = until(replaced, 240)
    assert took > 80
    assert served == {True}


@pytest.mark.long
def test_a_worker_that_falls_back_after_verification_is_told_until_it_runs_the_engine_again(
    stack, stable, pack_again, add_code, until, tmp_path
):
    flag = tmp_path / "no engine"
    archive = pack_again("9.30.0")
    if not json.loads(zipfile.ZipFile(archive).read("contract.json")).get("fallback"):
        pytest.skip("the served model has no fallback")
    code = f"""
from handlers import model as _model
_build_well = _model.build_engine

def _build(choice, **options):
    if choice.name != "eager" and Path({str(flag)!r}).exists():
        raise _model.EngineError("the test forbids it")
    return _build_well(choice, **options)

_model.build_engine = _build
"""
    assert stack.command("deploy", str(add_code(archive, code))).returncode == 0
    until(lambda: stack.health().json()["status"] == "ok", 60)
    flag.touch()
    os.kill(stack_worker(stack, "9.30.0"), signal.SIGKILL)
    told = "9.30.0: 1 of 1 predict workers run the fallback engine"
    until(lambda: stack.health().json()["reasons"] == [told], 90)
    metrics = httpx.get(f"{stack.gateway}/metrics", timeout=10).text
    assert 'gateway_workers_fallback{kind="predict",model="cifar10",role="retained",version="9.30.0"} 1.0' in metrics
    flag.unlink()
    os.kill(stack_worker(stack, "9.30.0"), signal.SIGKILL)
    until(lambda: stack.health().json()["status"] == "ok", 90)


def stack_worker(stack, version: str) -> int:
    """The process id of a version's only predict worker."""
    with stack.management() as client:
        found = client.get("/models/cifar10/all").json()
    (described,) = [entry for entry in found if entry["modelVersion"] == version]
    (worker,) = described["workers"]
    return worker["pid"]
