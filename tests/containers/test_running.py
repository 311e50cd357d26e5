"""The containers as they run: what answers, what is out of reach, what happens when one is killed or stopped.

Built and started by Compose, as a project of its own, on free ports of the loopback address.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.docker
ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "tests" / "samples" / "cat" / "0.png"
DOCKER = shlex.split(os.environ.get("DOCKER") or "docker")
COMPOSE = shlex.split(os.environ.get("COMPOSE") or "docker compose")
PROJECT = "gradserve-test"
# Gunicorn's and the agent's grace periods, and some for the engine.
STOP_WITHIN_S = 120
UP_WITHIN_S = 480
SAMPLES = ROOT / "tests" / "samples"
SERVED = ("torchserve", "gateway", "mlflow")
PRIVATE_PORTS = (9100, 9101, 9102, 9103, 9104, 9105, 7070, 7071, 8080, 8081, 8082)
PROBE = """
import socket, sys
host, ports = sys.argv[1], sys.argv[2:]
for port in ports:
    try:
        socket.create_connection((host, int(port)), 2).close()
        print(port, "open")
    except OSError as error:
        print(port, type(error).__name__)
"""
log = logging.getLogger("containers")


def docker(*arguments: str, check: bool = True, timeout_s: float = 120) -> str:
    """What a docker command prints on stdout."""
    done = subprocess.run(
        [*DOCKER, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT
    )
    if check:
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr[-2000:]}"
    return done.stdout.strip()


@dataclass
class Project:
    """A running Compose project: where it answers, and what it is told."""

    environment: dict[str, str]
    gateway: str
    mlflow: str

    def compose(self, *arguments: str, timeout_s: float = STOP_WITHIN_S) -> str:
        """What a Compose command prints on both streams; a failure fails the test."""
        done = subprocess.run(
            [*COMPOSE, "-p", PROJECT, *arguments],
            cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, check=False, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, f"compose {' '.join(arguments)}: {done.stdout[-4000:]}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers, those of `run` left out."""
        labels = (f"label=com.docker.compose.project={PROJECT}", f"label=com.docker.compose.service={service}")
        found = docker("ps", "-aq", "--filter", labels[0], "--filter", labels[1]).split()
        return [
            c
            for c in found
            if docker("inspect", "-f", '{{index .Config.Labels "com.docker.compose.oneoff"}}', c) != "True"
        ]

    def container(self, service: str) -> str:
        """The id of a service's only container."""
        own = self.containers(service)
        assert len(own) == 1, f"{service}: {own}"
        return own[0]

    def inspect(self, service: str) -> dict:
        """What the engine knows of a service's container."""
        return json.loads(docker("inspect", self.container(service)))[0]

    def run(self, service: str, script: str) -> str:
        """What a Python script prints in a service's running container."""
        return docker("exec", self.container(service), "python", "-c", script)

    def health(self) -> dict:
        """The gateway's /health."""
        return httpx.get(f"{self.gateway}/health", timeout=5).json()


@dataclass
class Load:
    """Callers on the gateway, each with connections of its own, until the block ends; every call is noted by its id."""

    url: str
    callers: int = 4
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        """Starts the callers."""
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(self.callers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the callers."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def statuses(self) -> Counter:
        """How many answers there were of each status."""
        return Counter(answer.status_code for answer in self.answers.values())

    def _call(self, number: int) -> None:
        image = IMAGE.read_bytes()
        with httpx.Client(timeout=20) as client:
            for count in itertools.count():
                if self._stop.is_set():
                    return
                name, began = f"load-{number}-{count}", time.monotonic()
                headers = {"content-type": "image/png", "x-request-id": name}
                try:
                    self.answers[name] = client.post(f"{self.url}/predict", content=image, headers=headers)
                except httpx.HTTPError as error:
                    self.failures[name] = repr(error)
                self.times[name] = (began, time.monotonic())
                time.sleep(0.01 if name in self.answers and self.answers[name].status_code == 200 else 0.1)


def wait_until(is_true, within_s: float) -> float:
    """Seconds until `is_true()`; fails the test when it does not come."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            if is_true():
                return time.monotonic() - began
        time.sleep(0.2)
    pytest.fail(f"not true within {within_s} s")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as sockets:
        probes = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="session")
def idle_project():
    """The project with its images built and nothing running."""
    gateway, mlflow, prometheus = free_ports(3)
    settings = ("AGENT_", "GATEWAY_", "GRADSERVE_HOME", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    ports = {"GATEWAY_PORT": str(gateway), "MLFLOW_PORT": str(mlflow), "PROMETHEUS_PORT": str(prometheus)}
    project = Project(environment | ports, f"http://127.0.0.1:{gateway}", f"http://127.0.0.1:{mlflow}")
    project.compose("down", "--volumes", "--remove-orphans")
    project.compose("build", "prepare", "gateway", "mlflow", timeout_s=1800)
    yield project
    project.compose("--profile", "monitoring", "--profile", "tools", "down", "--volumes", "--remove-orphans")


@pytest.fixture(scope="session")
def started(idle_project):
    """The project after `up -d`, with what that printed."""
    return idle_project, idle_project.compose("up", "-d", timeout_s=UP_WITHIN_S)


@pytest.fixture
def project(started):
    """The running project, whole: whoever breaks something waits until it is whole again, or the next one does."""
    running, _ = started
    wait_until(lambda: running.health()["status"] == "ok", 240)
    return running


def test_up_returns_when_everything_answers(started):
    project, _ = started
    # At once: `up` says that it is ready.
    call = {"content": IMAGE.read_bytes(), "headers": {"content-type": "image/png"}}
    predicted = httpx.post(f"{project.gateway}/predict", **call, timeout=10)
    assert predicted.status_code == 200, predicted.text
    assert set(predicted.json()) >= {"class", "confidence", "model", "request_id"}
    wait_until(lambda: project.health()["status"] == "ok", 120)
    explained = httpx.post(f"{project.gateway}/explain", **call, timeout=10)
    assert explained.headers["content-type"] == "image/png"
    assert explained.content.startswith(b"\x89PNG")
    assert "gateway_requests_total" in httpx.get(f"{project.gateway}/metrics", timeout=10).text
    wait_until(lambda: httpx.get(f"{project.mlflow}/health", timeout=10).text == "OK", 120)
    assert "<title>MLflow</title>" in httpx.get(project.mlflow, timeout=10).text


def test_images_hold_no_compiler_no_cache_and_the_gateways_no_torch(idle_project):
    looks = "command -v gcc cc g++ make; ls -d /root/.cache /tmp/* 2>/dev/null; true"
    images = {name: docker("inspect", "-f", "{{.Config.Image}}", idle_project.container(name)) for name in SERVED}
    for image in images.values():
        assert docker("run", "--rm", "--user=0", "--network=none", "--entrypoint=sh", image, "-c", looks) == "", image
    finds = "find / -xdev -name 'torch*' -path '*site-packages*' -maxdepth 7; true"
    assert docker("run", "--rm", "--user=0", "--network=none", "--entrypoint=sh", images["gateway"], "-c", finds) == ""


def test_the_gateways_image_stays_small(project):
    base = os.environ.get("BASE_IMAGE") or "python:3.11-slim-bookworm"
    image = project.inspect("gateway")["Image"]
    sizes = [int(docker("image", "inspect", "-f", "{{.Size}}", name)) for name in (image, base)]
    assert sizes[0] - sizes[1] < 250e6


@pytest.mark.parametrize("service", SERVED)
def test_processes_run_without_rights_on_a_file_system_that_they_cannot_write(project, service):
    script = (
        "import json, os; s = dict(l.split(':', 1) for l in open('/proc/1/status')); "
        "print(json.dumps({'uid': os.getuid(), 'caps': [s[k].strip() for k in ('CapEff', 'CapPrm', 'CapBnd')], "
        "'new': s['NoNewPrivs'].strip(), 'written': [d for d in ('/', '/app', '/opt/venv', '/srv/gradserve') "
        "if os.access(d, os.W_OK)]}))"
    )
    found = json.loads(project.run(service, script))
    assert found == {"uid": 10001, "caps": ["0" * 16] * 3, "new": "1", "written": []}
    host = project.inspect(service)["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0


def test_torchserve_and_agent_are_out_of_reach_of_other_networks(project):
    networks = project.inspect("torchserve")["NetworkSettings"]["Networks"]
    (address,) = [network["IPAddress"] for network in networks.values()]
    image = project.inspect("gateway")["Image"]
    ports = [str(port) for port in PRIVATE_PORTS]
    for network in ("public", "tracking"):
        probe = ("run", "--rm", "--network", f"{PROJECT}_{network}", "--entrypoint", "python", image, "-c", PROBE)
        assert "open" not in docker(*probe, address, *ports)
    # The same probe finds open what the gateway needs, and nothing else, where it may.
    reached = docker("exec", project.container("gateway"), "python", "-c", PROBE, "torchserve", *ports)
    assert re.findall(r"(\d+) open", reached) == ["9100", "9101", "9103"]
    # Nor from inside: neither TorchServe's management nor its gRPC has a port.
    inside = docker("exec", project.container("torchserve"), "python", "-c", PROBE, "127.0.0.1", *ports)
    assert re.findall(r"(\d+) open", inside) == ["9100", "9101", "9103"]
    assert project.inspect("torchserve")["HostConfig"]["PortBindings"] in ({}, None)


def test_operators_commands_run_in_a_container(project):
    status = json.loads(project.compose("run", "--rm", "-T", "gradserve", "status", "--json").splitlines()[-1])
    assert status["ok"] is True


def test_a_killed_torchserve_container_comes_back_and_nothing_hangs_meanwhile(project):
    before = project.inspect("torchserve")
    with Load(project.gateway) as load:
        wait_until(lambda: load.statuses()[200] > 50, 30)
        os.kill(before["State"]["Pid"], signal.SIGKILL)
        wait_until(lambda: project.inspect("torchserve")["RestartCount"] > before["RestartCount"], 60)
        wait_until(lambda: load.statuses()[503] > 0, 30)
        wait_until(lambda: httpx.get(f"{project.gateway}/readyz", timeout=5).status_code == 200, 240)
        answered = load.statuses()[200]
        wait_until(lambda: load.statuses()[200] > answered + 50, 60)
    log.info("statuses %s, failures %s", dict(load.statuses()), load.failures)
    assert load.failures == {}
    # What was inside TorchServe when it was killed is lost: no more calls than there are callers.
    lost = [answer for answer in load.answers.values() if answer.status_code not in {200, 503}]
    assert len(lost) <= load.callers, [answer.text for answer in lost]
    refused = [answer for answer in load.answers.values() if answer.status_code == 503]
    assert all("retry-after" in answer.headers for answer in refused)
    assert max(end - began for began, end in load.times.values()) < 11


def predictions(container: str) -> float:
    """Return how many predictions the TorchServe in a container has made."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9103/metrics').read().decode())"
    counts = docker("exec", container, "python", "-c", script)
    return sum(map(float, re.findall(r'(?m)^ts_inference_requests_total\{.*model_name="cifar10".*\} (\S+)$', counts)))


def test_a_second_replica_comes_is_killed_comes_back_and_goes_under_load(project):
    scale = ("up", "-d", "--no-deps", "--scale")
    before = project.containers("torchserve")
    with Load(project.gateway) as load:
        wait_until(lambda: load.statuses()[200] > 20, 30)
        try:
            project.compose(*scale, "torchserve=2", "torchserve", timeout_s=UP_WITHIN_S)
            (new,) = set(project.containers("torchserve")) - set(before)
            wait_until(lambda: predictions(new) > 100, 240)
            status = json.loads(project.compose("run", "--rm", "-T", "gradserve", "status", "--json").splitlines()[-1])
            assert status["ok"] is True
            assert project.health()["replicas"] == {"known": 2, "seen": 2}
            assert set(load.statuses()) == {200}
            os.kill(json.loads(docker("inspect", new))[0]["State"]["Pid"], signal.SIGKILL)
            wait_until(lambda: 0 < predictions(new) < 100, 240)  # it counts from zero again
        finally:
            project.compose(*scale, "torchserve=1", "torchserve")
        wait_until(lambda: project.health()["replicas"] == {"known": 1, "seen": 1}, 30)
        answered = load.statuses()[200]
        wait_until(lambda: load.statuses()[200] > answered + 50, 60)
    log.info("statuses %s, failures %s", dict(load.statuses()), load.failures)
    assert load.failures == {}
    # The kill costs no more calls than there are callers: those that the replica had begun.
    assert set(load.statuses()) <= {200, 502}
    assert load.statuses()[502] <= load.callers
    assert len(project.containers("torchserve")) == 1


def test_a_training_in_a_container_is_recorded_and_served(project):
    volume = ("-v", f"{SAMPLES}:/images:ro")
    run = ("run", "--rm", "-T", *volume, "training")
    options = ("--epochs", "1", "--batch-size", "16", "--validation", "0.4", "--workers", "1", "--name", "cifar10")
    said = project.compose(
        *run, "train", "--data", "imagefolder:/images", *options, "--output", "runs/first", timeout_s=480
    )
    assert "best held-out accuracy" in said
    version = "9.0.0"
    package = ("package", "runs/first", "--version", version)
    project.compose(*run, *package, timeout_s=300)
    operator = ("run", "--rm", "-T", "gradserve")
    # By its number in MLflow's registry, which packing has given the archive.
    project.compose(*operator, "deploy", "cifar10/1", "--yes", timeout_s=400)
    call = {"content": IMAGE.read_bytes(), "headers": {"content-type": "image/png"}}
    answer = httpx.post(f"{project.gateway}/predict?version={version}", **call, timeout=10)
    assert answer.json()["model"]["version"] == version
    project.compose(*operator, "promote", version, timeout_s=200)
    champion = httpx.get(
        f"{project.mlflow}/ajax-api/2.0/mlflow/registered-models/alias",
        params={"name": "cifar10", "alias": "champion"},
        timeout=10,
    )
    assert champion.json()["model_version"]["version"] == "1", champion.text
    project.compose(*operator, "rollback", timeout_s=200)
    project.compose(*operator, "retire", version, timeout_s=200)


def test_prometheus_scrapes_gateway_and_torchserve(project):
    if not os.environ.get("PROMETHEUS_IMAGE"):
        pytest.skip("set PROMETHEUS_IMAGE to an image of Prometheus that is here")
    project.compose("--profile", "monitoring", "up", "-d", "--no-deps", "prometheus")
    url = f"http://127.0.0.1:{project.environment['PROMETHEUS_PORT']}/api/v1/query"

    def up() -> dict[str, str]:
        result = httpx.get(url, params={"query": "up"}, timeout=5).json()["data"]["result"]
        return {series["metric"]["job"]: series["value"][1] for series in result}

    wait_until(lambda: up() == {"gateway": "1", "torchserve": "1", "prometheus": "1"}, 60)
    asked = {"query": "sum(ts_inference_requests_total)"}
    wait_until(lambda: httpx.get(url, params=asked, timeout=5).json()["data"]["result"], 30)


def test_another_address_asks_for_keys(project, tmp_path):
    mount = ("--user", str(os.getuid()), "-v", f"{tmp_path}:/keys", "-e", "GATEWAY_KEYS_FILE=/keys/keys.json")
    made = project.compose("run", "--rm", "-T", *mount, "gradserve", "keys", "make", "alice")
    (tmp_path / "keys.json").chmod(0o644)
    (port,) = free_ports(1)
    settings = {"PUBLIC_ADDRESS": "127.0.0.2", "PUBLIC_PORT": str(port), "GATEWAY_KEYS_FILE": f"{tmp_path}/keys.json"}
    public = replace(project, environment=project.environment | settings)
    files = ("-f", "docker-compose.yml", "-f", "config/compose.public.yml")
    public.compose(*files, "up", "-d", "--no-deps", "gateway")
    try:
        wait_until(lambda: httpx.get(f"{project.gateway}/readyz", timeout=5).status_code == 200, 60)
        key = {"authorization": f"Bearer {re.search(r'gs_[A-Za-z0-9_-]+', made)[0]}"}
        for url in (project.gateway, f"http://127.0.0.2:{port}"):
            for headers, status in (({}, 401), (key, 200)):
                sent = {"content-type": "image/png", **headers}
                answer = httpx.post(f"{url}/predict", content=IMAGE.read_bytes(), headers=sent, timeout=10)
                assert answer.status_code == status, answer.text
    finally:
        project.compose("up", "-d", "--no-deps", "gateway")


def test_down_under_load_loses_no_request_that_was_accepted(project, tmp_path):
    file_name = tmp_path / "gateway.log"
    with file_name.open("wb") as file:
        follower = subprocess.Popen([*DOCKER, "logs", "-f", "--since", "0s", project.container("gateway")], stdout=file)
        with Load(project.gateway) as load:
            wait_until(lambda: load.statuses()[200] > 100, 60)
            down = threading.Thread(target=project.compose, args=("down",), kwargs={"timeout_s": STOP_WITHIN_S})
            down.start()
            down.join()
            time.sleep(1)
        follower.wait(20)
    lines = [json.loads(line) for line in file_name.read_text("utf-8").splitlines() if line.startswith("{")]
    accepted = {line["request_id"]: line["status"] for line in lines if "request_id" in line}
    log.info(
        "accepted %d, statuses %s, connections refused %d", len(accepted), dict(load.statuses()), len(load.failures)
    )
    assert len(accepted) > 100
    unanswered = [name for name in load.failures if name in accepted]
    assert unanswered == []
    assert set(load.statuses()) <= {200, 503}
    drained = [answer for answer in load.answers.values() if answer.status_code == 503]
    assert all(answer.json()["code"] in {"draining", "not_ready"} for answer in drained)
