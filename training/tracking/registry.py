"""A trained run as a registered MLflow model, which `mlflow.pyfunc` loads anywhere: signature, example, no pickle."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from safetensors.torch import save_file

import contracts
import handlers
from training.package.artifacts import read_model
from training.tracking.store import tracking_uri

if TYPE_CHECKING:
    from contracts.model import Contract

CHALLENGER = "challenger"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors")


def register(folder: Path, run_id: str) -> str:
    """Logs the run folder's best model to its MLflow run, registers it as `challenger` and returns the version.

    Raises:
        MlflowException: the store cannot be reached or refuses.
        ModelError: the folder holds no model.
    """
    contract, network = read_model(folder)
    mlflow.set_tracking_uri(tracking_uri())
    with (
        tempfile.TemporaryDirectory() as temporary,
        mlflow.start_run(run_id=run_id, log_system_metrics=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # MLflow asks for type hints that it can read; the signature is given
        files = Path(temporary) / "model"
        files.mkdir()
        shutil.copyfile(folder / "contract.json", files / "contract.json")
        save_file(
            {name: value.contiguous() for name, value in network.state_dict().items()}, files / "weights.safetensors"
        )
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(files)},
            code_paths=[str(Path(str(package.__file__)).parent) for package in (contracts, handlers)],
            signature=_signature(contract),
            input_example=np.zeros((1, contract.input.height, contract.input.width, 3), np.uint8),
            pip_requirements=[f"{package}=={_version(package)}" for package in _PACKAGES],
            registered_model_name=contract.name,
        )
    version = str(logged.registered_model_version)
    MlflowClient().set_registered_model_alias(contract.name, CHALLENGER, version)
    return version


def _signature(contract: Contract) -> ModelSignature:
    size = contract.input
    images = TensorSpec(np.dtype(np.uint8), (-1, size.height, size.width, 3))
    probabilities = TensorSpec(np.dtype(np.float32), (-1, len(contract.classes)))
    return ModelSignature(Schema([images]), Schema([probabilities]))


def _version(package: str) -> str:
    return metadata.version(package).partition("+")[0]  # without the local part, which no index knows
