"""Agents and gateways on hosts of their own, which are network namespaces, under load: what callers notice of failures.

A host that is killed loses the calls that it was working on, and no others: these are counted.
"""

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from contracts import plan as traffic_plan
from control.stack.stack import pack

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
IMAGE = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
CLIENTS = 6
PAUSE_S = 0.1  # of each client between two calls: the load is below what one replica can do
FOLLOWED_S = 1.0
CUT_OFF_S = 1.5  # two polls, of which the first is not answered
CLONE_NEWNET = 0x40000000
NETWORK = "10.77.0"
OPERATOR, AGENTS, GATEWAYS = 100, {"agent1": 1, "agent2": 2, "agent3": 3}, {"gateway1": 11, "gateway2": 12}


class Hosts:
    """Network namespaces on one switch; all of them, and the processes in them, end with the test."""

    def __init__(self) -> None:
        self._prefix = f"gs{os.getpid()}"
        self._names: list[str] = []
        self._processes: list[subprocess.Popen] = []
        self._switch = self._add("switch")
        self._ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self._switch, "link", "set", "br0", "up")

    def add(self, name: str, number: int) -> None:
        """Adds a host with the address `NETWORK.number`."""
        host, port = self._add(name), f"p{number}"
        self._ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", self._switch)
        self._ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        self._ip("-n", host, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            self._ip("-n", host, "link", "set", link, "up")

    def set_link(self, number: int, state: str) -> None:
        """Cuts the host off (`down`), at the switch as a broken cable does, or connects it again (`up`)."""
        self._ip("-n", self._switch, "link", "set", f"p{number}", state)

    def start(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
        """Starts a process on the host."""
        with log.open("ab") as output:
            inside = ["nsenter", f"--net={self._path(name)}", *command]
            self._processes.append(subprocess.Popen(inside, cwd=ROOT, env=environment, stdout=output, stderr=output))
        return self._processes[-1]

    def kill(self, name: str) -> None:
        """Kills every process on the host at once."""
        found = subprocess.run(["ip", "netns", "pids", self._full(name)], capture_output=True, text=True, check=True)
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def enter(self, name: str) -> None:
        """Moves the calling thread to the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with self._path(name).open("rb") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def close(self) -> None:
        """Kills all processes and removes all namespaces."""
        for name in self._names:
            self.kill(name)
        for process in self._processes:
            process.wait()
        for name in self._names:
            self._ip("netns", "delete", self._full(name))

    def _add(self, name: str) -> str:
        self._ip("netns", "add", self._full(name))
        self._names.append(name)
        return self._full(name)

    def _full(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _path(self, name: str) -> Path:
        return Path("/run/netns") / self._full(name)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Call:
    """One call: when it began and ended (monotonic time), its gateway, status (0: the connection broke), and answer."""

    began: float
    ended: float
    gateway: str
    status: int
    answer: str


@dataclass
class Load:
    """Clients that call the gateways in turn, from the operator's host, as a load balancer would.

    A connection that is refused was no call yet: the client takes the other gateway. Every other failure is one.
    """

    urls: list[str]
    calls: list[Call] = field(default_factory=list)
    is_over: bool = False

    def run(self) -> None:
        """Calls until `is_over`."""
        asyncio.run(self._run())

    def failed(self) -> list[Call]:
        """The calls that were not answered well, in the order of their ends."""
        return [call for call in self.calls if call.status != 200]

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, turn: int) -> None:
        while not self.is_over:
            turn += 1
            began = time.monotonic()
            url = self.urls[turn % len(self.urls)]
            try:
                answer = await client.post(f"{url}/predict", content=IMAGE)
            except httpx.ConnectError:
                continue
            except httpx.TransportError as error:
                self.calls.append(Call(began, time.monotonic(), url, 0, type(error).__name__))
            else:
                body = answer.json()
                told = body["model"]["version"] if answer.status_code == 200 else body["code"]
                self.calls.append(Call(began, time.monotonic(), url, answer.status_code, told))
            await asyncio.sleep(PAUSE_S)


class Site:
    """The hosts with their processes, and the API server that tells the gateways of the agents."""

    def __init__(self, hosts: Hosts, cluster, api: str, folder: Path, temp: Path) -> None:
        self.hosts, self._cluster, self._folder, self._temp = hosts, cluster, folder, temp
        self._inherited = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("AGENT_", "GATEWAY_", "GRADSERVE_", "PROMETHEUS_"))
        } | {
            "GRADSERVE_KUBERNETES_API": api,
            **dict.fromkeys(("GRADSERVE_PLAN", "GATEWAY_PLAN", "AGENT_PLAN"), "kubernetes:default/plan"),
            "GATEWAY_AGENTS": "kubernetes:default/agents:9100",
            "AGENT_MODEL_STORE": str(folder / "store"),
        }
        self.processes: dict[str, subprocess.Popen] = {}

    def start_agent(self, name: str) -> None:
        """Starts an agent with its TorchServe."""
        address = f"{NETWORK}.{AGENTS[name]}"
        temp = self._temp / name
        temp.mkdir()
        own = dict.fromkeys(("AGENT_HOST", "AGENT_INFERENCE_HOST", "AGENT_METRICS_HOST"), address)
        own |= {"AGENT_TEMP": str(temp), "AGENT_WORKERS": "1", "AGENT_CACHE": str(self._folder / f"cache-{name}")}
        # Without the capability that lets an agent lower priorities, as in a pod.
        command = ["setpriv", "--bounding-set=-sys_nice", sys.executable, "-m", "control.cli.main", "agent"]
        self.processes[name] = self._start(name, command, own)

    def start_gateway(self, name: str) -> None:
        """Starts a gateway."""
        own = {"GATEWAY_HOST": f"{NETWORK}.{GATEWAYS[name]}", "GATEWAY_AUTH": "off"}
        command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"]
        self.processes[name] = self._start(name, command, own)

    def list_agents(self, *names: str) -> None:
        """Tell the API server which agents there are."""
        endpoints = [{"addresses": [f"{NETWORK}.{AGENTS[name]}"]} for name in names]
        labels = {"kubernetes.io/service-name": "agents"}
        manifest = {"metadata": {"name": "agents-1", "labels": labels}, "addressType": "IPv4", "endpoints": endpoints}
        self._cluster.put(manifest)

    def command(self, *arguments: str) -> subprocess.Popen:
        """Starts a `gradserve` command on the operator's host."""
        return self._start("operator", [sys.executable, "-m", "control.cli.main", *arguments], {})

    def stable(self) -> str:
        """The stable version of the plan that the API server has."""
        return traffic_plan.loads(self._cluster.objects["plan"]["data"]["plan.json"]).models[0].stable.version

    def said(self, name: str) -> str:
        """Return what the processes of a host have printed."""
        return (self._folder / f"{name}.log").read_text()[-3000:]

    def get(self, url: str) -> httpx.Response:
        """The answer to a call from the operator's host."""
        with ThreadPoolExecutor(1, initializer=self.hosts.enter, initargs=("operator",)) as thread:
            return thread.submit(httpx.get, url, timeout=5, trust_env=False).result()

    def seen(self, gateway: str) -> int:
        """The agents that give a gateway a fresh status with a ready worker."""
        health = self.get(f"http://{NETWORK}.{GATEWAYS[gateway]}:8000/health").json()
        return sum(version["workers"]["predict"]["ready"] for version in health["versions"] if version["routable"])

    def answered(self, agent: str) -> float:
        """The predictions that the agent's TorchServe has answered, those of its own checks included."""
        text = self.get(f"http://{NETWORK}.{AGENTS[agent]}:9103/metrics").text
        counter = r'^ts_inference_requests_total\{.*model_name="cifar10".*\} ([0-9.eE+]+)$'
        return sum(map(float, re.findall(counter, text, re.MULTILINE)))

    def _start(self, name: str, command: list[str], own: dict[str, str]) -> subprocess.Popen:
        home = {"GRADSERVE_HOME": str(self._folder / name)}
        return self.hosts.start(name, command, self._inherited | home | own, self._folder / f"{name}.log")


@pytest.fixture
def site(cluster, serve_cluster, model_source, tmp_path, tmp_path_factory):
    """Two agents and two gateways that serve the model."""
    hosts = Hosts()
    try:
        for name, number in {"operator": OPERATOR, **AGENTS, **GATEWAYS}.items():
            hosts.add(name, number)
        thread = ThreadPoolExecutor(1, initializer=hosts.enter, initargs=("operator",))
        with serve_cluster(
            f"{NETWORK}.{OPERATOR}", lambda *how: thread.submit(ThreadingHTTPServer, *how).result()
        ) as api:
            made = Site(hosts, cluster, api, tmp_path, tmp_path_factory.mktemp("t"))
            made.list_agents("agent1", "agent2")
            for name in ("agent1", "agent2"):
                made.start_agent(name)
            for name in GATEWAYS:
                made.start_gateway(name)
            (tmp_path / "store").mkdir()
            archive = pack(model_source, tmp_path / "source")
            deploy = made.command("deploy", str(archive), "--model", "cifar10")
            assert deploy.wait(180) == 0, made.said("operator")
            yield made
    finally:
        hosts.close()


@pytest.fixture
def load(site, until):
    """Clients that call from now on; they end with the test."""
    for gateway in GATEWAYS:
        until(lambda gateway=gateway: site.seen(gateway) == 2, 60)
    load = Load([f"http://{NETWORK}.{number}:8000" for number in GATEWAYS.values()])

    def run() -> None:
        site.hosts.enter("operator")
        load.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until(lambda: len(load.calls) > 20, 20)
    yield load
    load.is_over = True
    thread.join(40)


def test_callers_lose_only_the_calls_that_a_killed_host_was_working_on(site, load, until, pack_again, capsys):
    version = site.stable()
    lost: Counter[str] = Counter()

    def check(event: str, happened: float = 0.0, *, may_lose: int = 0) -> None:
        """At most `may_lose` calls have failed since the last check, all of them begun before it happened."""
        failed = load.failed()[lost.total() :]
        assert len(failed) <= may_lose, (event, failed)
        assert all(call.began < happened + 0.1 for call in failed), (event, failed)
        lost[event] = len(failed)

    # Balance: each replica works on half of the calls.
    before = {name: site.answered(name) for name in ("agent1", "agent2")}
    time.sleep(20)
    worked = {name: site.answered(name) - count for name, count in before.items()}
    total = sum(worked.values())
    assert total > 200
    assert all(abs(count / total - 0.5) <= 0.05 for count in worked.values()), worked
    check("balance")

    # A plan change: all gateways follow within a second.
    deploy = site.command("deploy", str(pack_again("99.0.0")), "--canary", "1")
    assert deploy.wait(180) == 0, site.said("operator")
    promote = site.command("promote")
    until(lambda: site.stable() == "99.0.0", 60, every_s=0.005)
    changed = time.monotonic()
    time.sleep(3)
    assert promote.wait(60) == 0, site.said("operator")
    stale = [call for call in load.calls if call.began > changed + FOLLOWED_S and call.answer == version]
    assert not stale
    followed = max((call.began for call in load.calls if call.answer == version), default=changed) - changed
    check("plan change")

    # An agent's host is killed.
    happened = time.monotonic()
    site.hosts.kill("agent2")
    time.sleep(4)
    check("agent killed", happened, may_lose=CLIENTS)
    site.list_agents("agent1")

    # An agent joins.
    site.start_agent("agent3")
    site.list_agents("agent1", "agent3")
    until(lambda: site.answered("agent3") > 20, 120)  # it has no counters before TorchServe has started
    check("agent joins")

    # The new agent's host is cut off for some seconds; calls that were sent to it get there when it is back.
    happened = time.monotonic()
    site.hosts.set_link(AGENTS["agent3"], "down")
    time.sleep(5)
    site.hosts.set_link(AGENTS["agent3"], "up")
    back = time.monotonic()
    time.sleep(12)  # the longest that a call to it may take
    cut_off = [call for call in load.calls if happened + CUT_OFF_S < call.began < back]
    assert max(call.ended - call.began for call in cut_off) < 1, "no call is sent to it any more"
    check("partition", happened + CUT_OFF_S, may_lose=CLIENTS)
    joined = site.answered("agent3")
    until(lambda: site.answered("agent3") > joined + 20, 20)

    # An agent drains, as Kubernetes ends a pod: it leaves the list, and gets SIGTERM.
    site.list_agents("agent3")
    site.processes["agent1"].send_signal(signal.SIGTERM)
    assert site.processes["agent1"].wait(40) == 0, site.said("agent1")
    check("agent drains")

    # A gateway's host is killed.
    happened = time.monotonic()
    site.hosts.kill("gateway2")
    time.sleep(3)
    check("gateway killed", happened, may_lose=CLIENTS)

    with capsys.disabled():
        print(  # noqa: T201
            f"\n{len(load.calls)} calls; lost: {dict(lost)}; plan followed after {followed:.2f} s; balance {worked}"
        )
