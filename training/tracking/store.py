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
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from mlflow import MlflowClient

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

EXPERIMENT = "gradserve"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "mlflow")
# MLflow's own seven retries would hold a training up for four minutes at every call to a dead server.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_PROBE_WITHIN_S = 2.0


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
    if uri.startswith(("http://", "https://")):
        # Whatever it says, something listens; a host that swallows what is sent would cost each call its full time.
        httpx.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_WITHIN_S)
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
    """Return the environment of a result: versions, hardware, threads and the code's commit."""
    import torch  # noqa: PLC0415 - takes seconds, and the registry's readers need none of it

    facts = {f"version_{package}": version(package) for package in _PACKAGES}
    facts |= {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "git_commit": _git_commit(),
    }
    return facts


def _create_experiment(client: MlflowClient) -> str:
    # Beside the database, not in whatever folder the first training was started from; a server has a place of its own.
    uri = tracking_uri()
    beside = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts") if uri.startswith("sqlite:///") else None
    return client.create_experiment(EXPERIMENT, artifact_location=beside.as_uri() if beside else None)


def warn_on_failure(call: Callable[[], object]) -> bool:
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
