"""Makes a trained run into a version: half-precision weights, fitted temperature, reference inputs, contract, archive.

Every choice is made on the images that the run held out; the test images are not looked at.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar

from handlers import contract as contracts
from handlers.engines import build_engine, predict_all, softmax
from handlers.preprocess import decode_for_network, normalise, prepare
from training.artifacts import find_model, read_model
from training.data import load_training_images, stratified_split, stratified_subset
from training.errors import ModelError
from training.evaluate import expected_calibration_error
from training.export import REFERENCE_IMAGES, package_directory, write_reference
from training.inference import predict_logits
from training.recipe import Recipe, recipe_from_dict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from handlers.contract import Contract
    from handlers.engines import Engine
    from training.data import Images

# Far above what the order of float operations changes on another machine, far below what a wrong weight changes.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Package:
    """What `package` made: the version's folder and its archive."""

    folder: Path
    archive: Path
    contract: Contract


def package(source: str, version: str, store: Path, folder: Path, cache: Path) -> Package:
    """Writes the version's files to `folder` and its archive to `store`.

    Args:
        source: what `find_model` takes.
        version: the version's name.
        store: TorchServe's model store.
        folder: gets `contract.json`, `weights.safetensors` and `reference.json`.
        cache: where the data set is kept.

    Raises:
        ModelError: there is no such model, or it is a released one, whose version is settled.
        ExportError: the archive cannot be made.
        DataError: the held-out images cannot be had.
    """
    trained = find_model(source)
    contract, network = read_model(trained)
    if "recipe" not in contract.accepted:
        raise ModelError(f"{source} does not say how it was trained (contract.json, accepted.recipe)")
    folder.mkdir(parents=True, exist_ok=True)
    _save_half(network, folder / "weights.safetensors")
    held_out = held_out_images(recipe_from_dict(contract.accepted["recipe"]), cache)
    logits = predict_logits(network, held_out.images, contract.input).numpy()
    engine = replace(contract.engine, temperature=fit_temperature(logits, held_out.labels))
    accepted = contract.accepted | _acceptance(logits, held_out.labels, engine.temperature)
    contract = replace(
        contract,
        version=version,
        engine=engine,
        accepted=accepted,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    contracts.save(contract, folder / "contract.json")
    built = build_engine(contract.engine, network, directory=folder, device=torch.device("cpu"))
    images = [_encode(pixels) for pixels in held_out.images[:REFERENCE_IMAGES]]
    write_reference(
        folder / "reference.json", images, lambda encoded: _predict(built, contract, encoded), tolerance=TOLERANCE
    )
    return Package(folder, package_directory(folder, store), contract)


def held_out_images(recipe: Recipe, cache: Path) -> Images:
    """The images that a training by `recipe` did not learn from and that decide everything about its model."""
    images, _ = load_training_images(recipe.data, cache)
    if recipe.subset:
        images = images.pick(stratified_subset(images.labels, recipe.subset, recipe.seed))
    return images.pick(stratified_split(images.labels, recipe.validation, recipe.seed)[1])


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature that gives the logits (N, K) the smallest negative log-likelihood on the labels (N,).

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """

    def loss(log_temperature: float) -> float:
        chosen = softmax(logits, float(np.exp(log_temperature)))[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    return round(float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)), 4)


def _acceptance(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float) -> dict[str, float]:
    before, after = softmax(logits, 1.0), softmax(logits, temperature)
    return {
        "held_out_images": len(labels),
        "held_out_accuracy": float((after.argmax(axis=1) == labels).mean()),
        "held_out_calibration_error_before": expected_calibration_error(before, labels),
        "held_out_calibration_error": expected_calibration_error(after, labels),
    }


def _save_half(network: nn.Module, path: Path) -> None:
    """Rounds the network's weights to half precision, in place, and saves them: what is measured is what is kept."""
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_file(state, path)
    network.load_state_dict(state)


def _predict(engine: Engine, contract: Contract, encoded: Sequence[bytes]) -> NDArray[np.float32]:
    pixels = np.stack([prepare(decode_for_network(image, contract.input).image, contract.input) for image in encoded])
    return predict_all(engine, normalise(pixels, contract.input))


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
