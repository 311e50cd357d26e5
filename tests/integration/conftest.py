"""The whole stack for integration tests: TorchServe, agent and gateway on free ports, started by `gradserve up`."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from contracts import model as model_contract
from handlers.archive import load_network
from handlers.build import BUILD, identity
from handlers.engines import build_engine, predict_all
from handlers.network import build_network
from handlers.preprocess import decode_for_network, normalise, prepare
from training.package.export import package_directory, write_reference

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ROOT / "model_store" / "released"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
START_WITHIN_S = 180.0


@dataclass
class Stack:
    """One running `gradserve up`: where its parts answer, where its files are."""

    home: Path
    model_store: Path
    environment: dict[str, str]
    gateway: str
    agent: str
    inference: str
    management_log: Path
    process: subprocess.Popen | None = None
    output: Path = field(default_factory=Path)

    def start(self, source: Path, code: Path = ROOT) -> None:
        """Starts `gradserve up` without waiting for it, from the code in the folder `code`."""
        command = [sys.executable, "-m", "control.cli.main", "up", "--source", str(source)]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=code, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Returns when `gradserve up` says that an image was answered and explanations are there too."""
        wait_until(lambda: "ready:" in self.said(), START_WITHIN_S, self)
        wait_until(lambda: self.health().json()["status"] == "ok", START_WITHIN_S, self)

    def status(self) -> dict:
        """The agent's status."""
        return httpx.get(f"{self.agent}/status", timeout=5).json()

    def versions(self) -> list[dict]:
        """The versions in the agent's status."""
        return self.status()["versions"]

    def health(self) -> httpx.Response:
        """The gateway's view."""
        return httpx.get(f"{self.gateway}/health", timeout=5)

    def said(self) -> str:
        """What `gradserve up` has printed."""
        return self.output.read_text()

    def command(self, *arguments: str) -> subprocess.CompletedProcess:
        """Runs a `gradserve` command beside this stack."""
        command = [sys.executable, "-m", "control.cli.main", *arguments]
        # Not in the repository's folder, where somebody's .env and MLflow store may lie.
        return subprocess.run(
            command,
            cwd=self.home.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def plan(self, model: str | None = None) -> dict:
        """The traffic plan of a model, else of the default one."""
        plans = json.loads((self.home / "plan.json").read_text())
        (plan,) = (plan for plan in plans["models"] if plan["model"] == (model or plans["default"]))
        return {"revision": plans["revision"], **plan}

    def audit(self) -> list[dict]:
        """The audit log's entries."""
        return [json.loads(line) for line in (self.home / "audit.jsonl").read_text().splitlines()]

    def processes(self) -> dict[int, str]:
        """Every process of this stack, by its command line: its home or its TorchServe's folder stands in them."""
        marks = (str(self.home).encode(), self.environment["AGENT_TEMP"].encode())
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
                if command and int(folder.name) != os.getpid() and any(mark in command + environ for mark in marks):
                    found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def run_folder(self) -> Path:
        """The running agent's folder."""
        (folder,) = Path(self.environment["AGENT_TEMP"]).glob("ts-*")
        return folder

    def management(self) -> httpx.Client:
        """A client of TorchServe's management API, by the socket that only the agent's user can open."""
        transport = httpx.HTTPTransport(uds=str(self.run_folder() / "management.sock"))
        return httpx.Client(transport=transport, base_url="http://torchserve", timeout=10)

    def worker_pids(self, entry: str) -> list[int]:
        """Process ids of the READY workers of a TorchServe entry, as its management API tells them."""
        with self.management() as client:
            versions = client.get(f"/models/{entry}/all").json()
        return [w["pid"] for version in versions for w in version["workers"] if w["status"] == "READY"]

    def stop(self) -> None:
        """Stops everything, and kills what is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        if self.process is not None:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def wait_until(is_true, within_s: float, stack: Stack | None = None, every_s: float = 0.1) -> float:
    """Seconds until `is_true()`; a stack that ends meanwhile fails the test with what it said."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        with contextlib.suppress(httpx.HTTPError):
            if is_true():
                return time.monotonic() - began
        if stack is not None and stack.process is not None and stack.process.poll() is not None:
            pytest.fail(f"the stack ended: {stack.said()}")
        time.sleep(every_s)
    pytest.fail(f"not true within {within_s} s" + (f"; the stack said: {stack.said()}" if stack is not None else ""))


@pytest.fixture(scope="session")
def until():
    """`until(is_true, within_s, stack=None)`: waits, or fails the test."""
    return wait_until


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as sockets:
        probes = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="session")
def make_stack():
    """`make_stack(**settings)`: a stack on free ports in a folder of its own, not started; stopped in the end."""
    made = []

    def make(**settings: str) -> Stack:
        # Short, because TorchServe puts Unix sockets there; a path as people have them.
        folder = Path(tempfile.mkdtemp(prefix="Büro ü-"))
        gateway, agent, inference, metrics = free_ports(4)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AGENT_", "GATEWAY_", "GRADSERVE_"))}
        environment = inherited | {
            "GRADSERVE_HOME": str(folder / "home"),
            "PORT": str(gateway),
            "AGENT_TEMP": str(folder / "t"),
            "AGENT_MODEL_STORE": str(folder / "store"),
            "AGENT_PORT": str(agent),
            "AGENT_INFERENCE_PORT": str(inference),
            "AGENT_METRICS_PORT": str(metrics),
            # Gateways here follow within a second and answer within another.
            "AGENT_RETIRE_SETTLE_S": "4",
            # A machine that stands still for some seconds makes every status old.
            "GATEWAY_STATUS_MAX_AGE_S": "10",
            **settings,
        }
        stack = Stack(
            home=folder / "home",
            model_store=folder / "store",
            environment=environment,
            gateway=f"http://127.0.0.1:{gateway}",
            agent=f"http://127.0.0.1:{agent}",
            inference=f"http://127.0.0.1:{inference}",
            management_log=folder / "home" / "logs" / "management.log",
            output=folder / "up.log",
        )
        stack.output.touch()
        made.append((folder, stack))
        return stack

    yield make
    for folder, stack in made:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def read_only_code(tmp_path_factory):
    """A copy of the code that nobody may write to, in a folder whose name is not ASCII and has a space."""
    copy = tmp_path_factory.mktemp("code") / "Büro ü"
    for folder in (*(init.parent for init in ROOT.glob("*/__init__.py")), ROOT / "config"):
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    everything = [copy, *copy.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield copy
    for path in everything:
        path.chmod(0o755)


@pytest.fixture(scope="session")
def write_untrained(tmp_path_factory):
    """`write_untrained(version, …)`: a model's folder, ready to pack, with weights nobody trained."""

    def write(version: str, *, seed: int = 0, classes: tuple[str, ...] = CLASSES, name: str = "cifar10") -> Path:
        folder = tmp_path_factory.mktemp(f"untrained-{version}")
        size = model_contract.Input(32, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
        # As the released model explains: a version without its methods would break callers.
        explain = model_contract.load(RELEASED / "contract.json").explain
        contract = model_contract.Contract(name, version, classes, size, "resnet18_small", explain)
        torch.manual_seed(seed)
        weights = build_network(contract.architecture, len(classes)).state_dict()
        model_contract.save(contract, folder / "contract.json")
        save_file(
            {name: w.half() if w.is_floating_point() else w for name, w in weights.items()},
            folder / "weights.safetensors",
        )
        engine = build_engine(
            contract.engine, lambda: load_network(folder, contract), directory=folder, device=torch.device("cpu")
        )

        def predict(images):
            pixels = np.stack([prepare(decode_for_network(image, size).image, size) for image in images])
            return predict_all(engine, normalise(pixels, size))

        random = np.random.default_rng(seed)
        images = []
        for _ in range(32):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            images.append(file.getvalue())
        write_reference(folder / "reference.json", images, predict, tolerance=0.02)
        return folder

    return write


@pytest.fixture(scope="session")
def model_source(write_untrained) -> Path:
    """The model that the shared stack serves: the released one, or an untrained one where there is none."""
    return RELEASED if (RELEASED / "contract.json").is_file() else write_untrained("1.0.0")


@pytest.fixture(scope="session")
def stack(make_stack, model_source) -> Stack:
    """The stack that all integration tests share: whoever breaks something waits until it is whole again."""
    shared = make_stack()
    shared.start(model_source)
    shared.wait_until_ready()
    return shared


@pytest.fixture
def stable(stack) -> str:
    """The shared stack's stable version; whatever else the test brought in is out again afterwards."""
    version = stack.plan()["stable"]["version"]
    yield version
    if stack.plan()["stable"]["version"] != version:
        assert stack.command("promote", version).returncode == 0
    plan = stack.plan()
    for release in (plan["canary"], plan["shadow"], *plan["retained"]):
        if release:
            assert stack.command("retire", release["version"]).returncode == 0


@pytest.fixture(scope="session")
def pack_again(model_source, tmp_path_factory):
    """`pack_again(version, trouble="")`: the served model as another version, whose handler does `trouble` first.

    `trouble` is a statement, which is left out while the version is verified.
    """

    def pack(version: str, trouble: str = "") -> Path:
        folder = tmp_path_factory.mktemp("again")
        source = Path(shutil.copytree(model_source, folder / "source"))
        contract = json.loads((source / "contract.json").read_text())
        (source / "contract.json").write_text(json.dumps(contract | {"version": version}))
        archive = package_directory(source, folder)
        return with_trouble(archive, trouble) if trouble else archive

    return pack


def with_trouble(archive: Path, trouble: str) -> Path:
    """The archive with a handler that does `trouble` before it answers."""
    return with_code(
        archive,
        f"""
import random, time
_well = ImageHandler.handle

def _troubled(self, data, context):
    if "verify-" not in str(context.get_request_header(0, "x-gradserve")):
        {trouble}
    return _well(self, data, context)

ImageHandler.handle = _troubled
""",
    )


def with_code(archive: Path, code: str) -> Path:
    """The archive with `code` at the end of its handler's module, its own hashes brought up to date."""
    troubled = archive.with_name(f"troubled-{archive.name}")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(troubled, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        members["image_handler.py"] += code.encode()
        files = json.loads(members[BUILD])["files"]
        files["image_handler.py"] = hashlib.sha256(members["image_handler.py"]).hexdigest()
        members[BUILD] = json.dumps({"identity": identity(files), "files": files}).encode()
        for name, content in members.items():
            new.writestr(name, content)
    return troubled


@pytest.fixture(scope="session")
def add_code():
    """`add_code(archive, code)`: the archive with `code` at the end of its handler's module."""
    return with_code
