"""Finds a trained model by path, MLflow run or registry name, and reads it."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch

from contracts import model as model_contract
from handlers.archive import load_network
from handlers.build import BrokenArchive, digest
from handlers.network import build_network
from training.errors import ModelError
from training.tracking.store import tracking_uri

if TYPE_CHECKING:
    from torch import nn

    from contracts.model import Contract

WEIGHTS = ("weights.safetensors", "best.pth")


def find_model(source: str) -> Path:
    """The local folder of a model: a run's folder, a released folder, `runs:/RUN_ID` or `models:/NAME@alias`.

    Raises:
        ModelError: nothing is there, or it is no model of ours.
    """
    folder = Path(source)
    if source.startswith(("runs:/", "models:/")):
        downloaded = _download(source)
        folder = next((path.parent for path in sorted(downloaded.rglob("contract.json"))), downloaded)
    elif folder.name in WEIGHTS:
        folder = folder.parent
    if not (folder / "contract.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{source} holds no model (contract.json and one of {', '.join(WEIGHTS)}): "
            "train one with `gradserve train`, or name another folder, runs:/RUN_ID or models:/NAME@alias"
        )
    return folder


def weights_file(folder: Path) -> Path:
    """The weights in a model's folder."""
    return next(folder / name for name in WEIGHTS if (folder / name).is_file())


def read_model(folder: Path) -> tuple[Contract, nn.Module]:
    """The contract and the network (float32, evaluation mode) in a model's folder.

    Raises:
        ModelError: the weights do not fit the contract.
        ContractError: the contract cannot be used.
    """
    contract = model_contract.load(folder / "contract.json")
    path = weights_file(folder)
    try:
        if path.suffix == ".safetensors":
            return contract, load_network(folder, contract)
        network = build_network(contract.architecture, len(contract.classes))
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (BrokenArchive, OSError, EOFError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
        raise ModelError(f"{path} does not fit its contract: {error}") from error
    return contract, network.eval()


def weights_sha256(folder: Path) -> str:
    """The hash of the model's weights: which model a figure belongs to."""
    return digest(weights_file(folder))


def _download(source: str) -> Path:
    import mlflow  # noqa: PLC0415 - takes seconds

    mlflow.set_tracking_uri(tracking_uri())
    try:
        if source.startswith("runs:/"):
            run_id, _, path = source.removeprefix("runs:/").partition("/")
            return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path))
        return Path(mlflow.artifacts.download_artifacts(source))
    except (mlflow.MlflowException, OSError) as error:
        raise ModelError(f"{source} is not in MLflow ({tracking_uri()}): {error}") from error
