"""The local stack: `gradserve up` packs the model, starts the agent and the gateway, supervises and stops them.

The processes inherit the environment with all settings. Only what they must share is set here (addresses, plan, logs).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import httpx

from control.agent.torchserve.process import check_installed
from control.agent.torchserve.run_folder import run_base
from control.agents import ask_agent
from control.archive import inspect_archive
from control.errors import BadSetting, NoModel, NotAnswering, StoreNotWritable
from control.release.plan_store import PlanStore, first_plan, with_current_hash
from control.settings import PORTS, PREFIX, AgentSettings, local_url, read_agent_settings
from control.stack.ports import mlflow_port, refuse_taken_ports, with_free_ports
from control.stack.running import RunningStack, announce, find_running
from control.stack.supervisor import LOG_MB, SupervisedProcess, check_all, stop_all
from gateway.auth.callers import Callers
from gateway.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.status import AgentStatus

_State: TypeAlias = "tuple[object, ...]"
_ROOT = Path(__file__).resolve().parents[2]
STALLED_AFTER_S = 60.0
"""Seconds beyond AGENT_LOAD_TIMEOUT_S after which a start without any progress is given up."""
SAMPLES = Path("tests/samples")


@dataclass(frozen=True)
class StackOptions:
    """The options of `gradserve up`: the plan's home, the public port, and True in `mlflow` to start MLflow's page.

    `log_mb` is the number of megabytes of logs kept for each process.
    """

    home: Path
    port: int
    mlflow: bool = False
    log_mb: int = LOG_MB


@dataclass(frozen=True)
class Ready:
    """The gateway serves; `requires_key` is True if callers need an API key."""

    requires_key: bool


def run_stack(options: StackOptions, say: Callable[[str], None], prepare: Callable[[], None]) -> None:
    """Start all processes and supervise them until SIGTERM or Ctrl-C; a second signal kills them.

    `prepare` makes the plan and its archives; it is called after the checks of settings, ports, folders and programs.
    `say` gets each line for the operator.

    Raises:
        ControlError: the stack cannot run, or a process keeps dying; the text says why.
    """
    settings = with_free_ports(read_agent_settings(), {options.port})
    _check_gateway_settings()
    mlflow_at = mlflow_port({options.port, *settings.ports()}) if options.mlflow else None
    check_installed()
    refuse_taken_ports(wanted_ports(settings, options, mlflow_at), os.environ.get("GATEWAY_HOST") or "127.0.0.1")
    run_base(settings.temp)
    store = PlanStore(options.home)
    prepare()
    image = example_image(store, settings.model_store)
    # Two supervisors would rotate the same logs.
    log_folder = options.home / "logs" / (str(options.port) if find_running(options.home) else "")
    processes = stack_processes(settings, options, log_folder, mlflow_at)
    stop, kill = threading.Event(), threading.Event()

    def on_signal() -> None:
        (kill if stop.is_set() else stop).set()

    running = RunningStack(os.getpid(), _gateway_url(options), local_url(settings.host, settings.port))
    with _signals(on_signal), announce(options.home, running):
        try:
            for process in processes:
                process.start()
            say(f"starting: logs in {log_folder}")
            ready = wait_until_ready(processes, settings, _gateway_url(options), image, stop)
            if ready:
                say(_greeting(options, image, ready, mlflow_at))
            while not stop.is_set():
                check_all(processes)
                stop.wait(0.2)
            say("stopping")
        finally:
            _stop(processes, kill)


def _check_gateway_settings() -> None:
    """Raise BadSetting if the gateway would refuse this environment's settings, keys or quotas.

    It checks them itself at its start, in config/gunicorn.conf.py, but TorchServe would have started by then.
    """
    try:
        Callers(load_settings())
    except SettingsError as error:
        raise BadSetting([str(error)]) from error


def wanted_ports(settings: AgentSettings, options: StackOptions, mlflow_at: int | None = None) -> dict[int, str]:
    """Return every port the stack will listen on, with its use and the variable that moves it."""
    ports = settings.ports() | {options.port: "the gateway, moved by PORT"}
    return ports if mlflow_at is None else ports | {mlflow_at: "MLflow's page, moved by MLFLOW_PORT"}


def prepare_plan(store: PlanStore, source: Path, model_store: Path, say: Callable[[str], None]) -> None:
    """Pack the model in `source` if its archive is missing or outdated, and write the first plan if there is none.

    An existing plan stays in force; only the hash of an archive that was packed again is updated. The operators' lock
    is taken for this change only, so an operator's `deploy` that waits for its version does not delay a start.

    Raises:
        NoModel: there is neither a plan nor a model to pack.
        AnotherOperator: the plan has to be changed while another operator changes it.
        ControlError: the archive or the plan cannot be used.
    """
    if not source.is_dir():
        if not store.exists():
            raise NoModel(source, "the folder does not exist")
        return
    archive = pack(source, model_store)
    if not store.exists() or with_current_hash(store.read_all(), archive) != store.read_all():
        _write_plan(store, archive, say)
    plans = store.read_all()
    if archive.name not in {release.archive for plan in plans.models for release in plan.releases()}:
        say(f"{archive.name} is packed and not in the plan; stable stays {store.read().stable.version}")


def _write_plan(store: PlanStore, archive: Path, say: Callable[[str], None]) -> None:
    """Write the first plan, or the archive's new hash into the existing plan."""
    with store.lock("up"):
        if not store.exists():
            plan = store.write(first_plan(archive), "first plan")
            say(f"serving {plan.model} {plan.stable.version} from {archive.name}")
            return
        plans = store.read_all()
        renewed = with_current_hash(plans, archive)
        if renewed != plans:
            store.write_all(renewed, "repacked", archive=archive.name)


def pack(source: Path, model_store: Path) -> Path:
    """Return the archive of the model in `source`, packed again only if its bytes or the handlers' changed.

    Raises:
        NoModel: the model is incomplete.
        StoreNotWritable: the model must be packed, and `model_store` cannot be written to.
    """
    # Imported here: only packing needs them.
    from contracts.model import ContractError  # noqa: PLC0415
    from training.errors import ExportError  # noqa: PLC0415
    from training.package.export import package_directory  # noqa: PLC0415

    try:
        return package_directory(source, model_store)
    except OSError as error:
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC}:
            raise StoreNotWritable(model_store, error.strerror or type(error).__name__) from error
        raise NoModel(source, str(error)) from error
    except (ExportError, ContractError) as error:
        raise NoModel(source, str(error)) from error


def stack_processes(
    settings: AgentSettings, options: StackOptions, logs: Path, mlflow_at: int | None = None
) -> list[SupervisedProcess]:
    """Return the processes in the order of their start; they are stopped in reverse, so the gateway first."""
    shared = os.environ | {
        "GRADSERVE_HOME": str(options.home),
        "PYTHONUNBUFFERED": "1",
        "AGENT_PLAN": str(options.home / "plan.json"),
        "AGENT_MANAGEMENT_LOG": str(settings.management_log or logs / "management.log"),
        "GATEWAY_PLAN": str(options.home / "plan.json"),
        "GATEWAY_PORT": str(options.port),
        "GATEWAY_AGENTS": local_url(settings.host, settings.port),
        **{f"{PREFIX}{field.upper()}": str(getattr(settings, field)) for field in PORTS},
    }
    gunicorn = ["-m", "gunicorn", "-c", str(_ROOT / "config" / "gunicorn.conf.py"), "gateway.app:create_app()"]
    log_bytes = options.log_mb * 1_000_000
    agent = SupervisedProcess(
        "agent",
        [sys.executable, "-m", "control.cli.main", "agent"],
        shared,
        logs / "agent.log",
        settings.drain_timeout_s + 20,
        log_bytes,
    )
    gateway = SupervisedProcess("gateway", [sys.executable, *gunicorn], shared, logs / "gateway.log", 40.0, log_bytes)
    return [*([_mlflow_process(logs, log_bytes, mlflow_at)] if mlflow_at is not None else []), agent, gateway]


def _mlflow_process(logs: Path, log_bytes: int, port: int) -> SupervisedProcess:
    """Return MLflow's page, on loopback, with the store that training writes to."""
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"
    page = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", store]
    command = [sys.executable, "-m", "mlflow", "server", *page]
    return SupervisedProcess("mlflow", command, dict(os.environ), logs / "mlflow.log", 10.0, log_bytes)


def example_image(store: PlanStore, model_store: Path) -> Path:
    """Return an image file for the stable version: a sample of this repository, else one of its reference inputs.

    Raises:
        ControlError: the plan or the stable version's archive cannot be used.
    """
    archive = inspect_archive(model_store / store.read().stable.archive)
    for name in ("cat", *archive.classes):
        sample = SAMPLES / name / "0.png"
        if name in archive.classes and sample.is_file():
            return sample
    path = store.home / "example.png"
    path.write_bytes(archive.reference.images[0])
    return path


def wait_until_ready(
    processes: list[SupervisedProcess], settings: AgentSettings, gateway: str, image: Path, stop: threading.Event
) -> Ready | None:
    """Return once the gateway at the address `gateway` predicts and explains `image`; None if `stop` is set before.

    A start that makes progress may take any time: a large model, or a slow machine. Progress is a state of TorchServe
    and the versions that the agent did not report before. The agent itself gives up a version that loads for longer
    than AGENT_LOAD_TIMEOUT_S.

    Raises:
        NotAnswering: there was no progress for too long, or the stable version cannot be loaded.
        ProcessFailed: a process keeps dying.
    """
    began = progress_at = time.monotonic()
    patience_s = settings.load_timeout_s + STALLED_AFTER_S
    seen: set[_State] = set()
    reason = "the gateway does not listen yet"
    with httpx.Client(base_url=gateway, timeout=10.0, trust_env=False) as client:
        while not stop.is_set():
            check_all(processes)
            status = ask_agent(local_url(settings.host, settings.port)).status
            if failure := _stable_failure(status):
                raise NotAnswering(time.monotonic() - began, failure)
            with contextlib.suppress(httpx.HTTPError):
                ready, reason = _ask(client, image)
                if ready:
                    return ready
            if (state := _state(status)) not in seen:
                seen.add(state)
                progress_at = time.monotonic()
            if time.monotonic() - progress_at > patience_s:
                raise NotAnswering(time.monotonic() - began, reason, patience_s)
            stop.wait(0.2)
    return None


def _state(status: AgentStatus | None) -> _State:
    """Return what changes while TorchServe and the versions start; a process that starts again repeats its states."""
    if status is None:
        return ()
    versions = ((found.version, found.state, found.predict.ready, found.explain.ready) for found in status.versions)
    return status.torchserve.state, *versions


def _ask(client: httpx.Client, image: Path) -> tuple[Ready | None, str]:
    """Return `Ready` if both calls of the greeting work, else None and the reason."""
    # A gateway that requires keys refuses both calls; /readyz, which needs no key, shows that it could answer.
    answer = client.get("/readyz")
    for route in ("/predict", "/explain"):
        if answer.status_code == 200:
            answer = client.post(route, files={"file": image.read_bytes()})
        if answer.status_code == 401:
            return Ready(requires_key=True), ""
    if answer.status_code != 200:
        return None, f"status {answer.status_code}, {answer.text[:200]}"
    return Ready(requires_key=False), ""


def _stable_failure(status: AgentStatus | None) -> str | None:
    """Return the reason if the agent gave up loading the stable version, else None."""
    versions = status.versions if status is not None else ()
    return next((found.reason for found in versions if found.role == "stable" and found.state == "failed"), None)


def _gateway_url(options: StackOptions) -> str:
    return local_url(os.environ.get("GATEWAY_HOST", ""), options.port)


def _greeting(options: StackOptions, image: Path, ready: Ready, mlflow_at: int | None) -> str:
    address = _gateway_url(options)
    curl = "curl -f -H 'x-api-key: YOUR_KEY'" if ready.requires_key else "curl -f"
    field = shlex.quote(f"file=@{image}")
    lines = [
        f"ready: {address}",
        f"  {curl} -F {field} {address}/predict",
        f"  {curl} -F {field} {address}/explain -o heatmap.png",
        *([f"  MLflow: http://127.0.0.1:{mlflow_at}"] if mlflow_at is not None else []),
        "Ctrl-C stops everything.",
    ]
    return "\n".join(lines)


def _stop(processes: list[SupervisedProcess], kill: threading.Event) -> None:
    """Stop the processes in order; kill all of them when `kill` is set."""
    threading.Thread(target=_kill_when, args=(kill, processes), daemon=True).start()
    stop_all(processes)


def _kill_when(kill: threading.Event, processes: list[SupervisedProcess]) -> None:
    kill.wait()
    for process in processes:
        if process.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.child.pid, signal.SIGKILL)


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """Call `on_signal` on SIGTERM, SIGINT and SIGHUP while the block runs."""
    signums = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {signum: signal.signal(signum, lambda *_: on_signal()) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
