"""MLflow's side of a training: parameters, metrics and artifacts in a local SQLite store or on a server.

A tracking store that fails must not cost a training: every call that fails is logged and left behind, and the files of
the run's folder stay the truth.
"""

from __future__ import annotations

import logging
import os
import platform
import sqlite3
import subprocess
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

EXPERIMENT = "gradserve"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "mlflow")
# MLflow's own seven retries would hold a training up for four minutes at every call to a dead server.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect() -> MlflowClient:
    """A client of the store; one that is out of reach fails within seconds. What the environment says goes first.

    Raises:
        Exception: whatever MLflow or SQLite raise.
    """
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        # MLflow would try to open a file that is no database for two minutes.
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("SELECT name FROM sqlite_master LIMIT 1")
    return MlflowClient(tracking_uri=uri)


def experiment_id(client: MlflowClient) -> str:
    """The id of our experiment, which is made where there is none."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return experiment.experiment_id if experiment else _create_experiment(client)


def environment() -> dict[str, str]:
    """What a result depends on besides its parameters: versions, hardware, threads and the code's commit."""
    import torch  # noqa: PLC0415 - takes seconds, and the registry's readers need none of it

    facts = {f"version_{package}": version(package) for package in _PACKAGES}
    facts |= {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "git_commit": _git_commit(),
    }
    return facts


class Tracker:
    """One MLflow run; `run_id` is empty when the store could not be reached at all."""

    def __init__(self, name: str, run_id: str = "") -> None:
        self.run_id = run_id
        self._client: MlflowClient | None = None
        survive(lambda: self._open(name))

    @property
    def is_open(self) -> bool:
        """Whether there is a store to write to."""
        return self._client is not None

    def params(self, params: dict[str, Any]) -> None:
        """Records hyper-parameters."""
        entries = [Param(key, str(value)) for key, value in params.items()]
        self._send(lambda client: client.log_batch(self.run_id, params=entries))

    def tags(self, tags: dict[str, str]) -> None:
        """Records facts about the run."""
        entries = [RunTag(key, value) for key, value in tags.items()]
        self._send(lambda client: client.log_batch(self.run_id, tags=entries))

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """Records one value of each metric at `step` (an epoch, counted from 1)."""
        now = int(time.time() * 1000)
        entries = [Metric(key, value, now, step) for key, value in metrics.items()]
        self._send(lambda client: client.log_batch(self.run_id, metrics=entries))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keeps a copy of the file."""
        self._send(lambda client: client.log_artifact(self.run_id, str(path), folder))

    def finish(self, status: str = "FINISHED") -> None:
        """Closes the run as `FINISHED`, `FAILED` or `KILLED`."""
        self._send(lambda client: client.set_terminated(self.run_id, status))

    def _open(self, name: str) -> None:
        client = connect()
        if self.run_id:
            client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = client.create_run(experiment_id(client), run_name=name).info.run_id
        self._client = client

    def _send(self, call: Callable[[MlflowClient], object]) -> None:
        client = self._client
        if client is not None:
            survive(lambda: call(client))


def _create_experiment(client: MlflowClient) -> str:
    # Beside the database, not in whatever folder the first training was started from; a server has a place of its own.
    uri = tracking_uri()
    beside = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts") if uri.startswith("sqlite:///") else None
    return client.create_experiment(EXPERIMENT, artifact_location=beside.as_uri() if beside else None)


def survive(call: Callable[[], object]) -> bool:
    """Makes a call to MLflow and returns whether it went well; whatever it raises becomes a warning."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - MLflow raises whatever its store raises
        logger.warning("MLflow: %s: %s", type(error).__name__, (str(error).splitlines() or [""])[0])
        return False
    return True


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
