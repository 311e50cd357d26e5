import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from contracts.model import Input
from training.data.images import Images
from training.data.training_data import TrainingData
from training.evaluate.evaluate import evaluate
from training.recipe import Augmentation, Recipe
from training.run import Run
from training.tracking.registry import register
from training.train import train

DATA = f"imagefolder:{Path(__file__).parents[1]}/samples"


@pytest.fixture(scope="session", autouse=True)
def _own_tracking_store(tmp_path_factory):
    """One MLflow store for all tests: making its tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


class TinyNetwork(nn.Module):
    """Layers named as a ResNet's, for images of 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn1(self.conv1(images)).relu().mean((2, 3)))


@pytest.fixture(scope="session")
def tiny_data() -> TrainingData:
    """48 images to learn from and 12 held out, of three colours."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = rng.integers(0, 100, (60, 8, 8, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 100
    whole = Images(images, labels, ("red", "green", "blue"))
    size = Input(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return TrainingData(whole.pick(np.arange(48)), whole.pick(np.arange(48, 60)), size, whole.sha256())


@pytest.fixture
def tiny_run(tmp_path, tiny_data) -> Callable[[Recipe], Run]:
    """Begins a training of the tiny network by a recipe."""

    def begin(recipe: Recipe) -> Run:
        torch.manual_seed(recipe.seed)
        return Run(recipe, tmp_path, tiny_data, TinyNetwork(), architecture="resnet18_small")

    return begin


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, cache) -> Path:
    """The folder of a training of one epoch on the samples; do not write to it."""
    recipe = Recipe(
        data=DATA, epochs=1, batch_size=40, sizes=((0.0, 8),), workers=0, validation=0.2, augmentation=Augmentation(0)
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "run", cache, registers=False)


@dataclass(frozen=True)
class Registered:
    """A registered run: its folder, its id in MLflow, and the number of its model's version."""

    folder: Path
    run_id: str
    number: str


@pytest.fixture(scope="session")
def registered(run_folder) -> Registered:
    """The run of `run_folder`, registered."""
    run_id = json.loads((run_folder / "contract.json").read_text())["accepted"]["run_id"]
    return Registered(run_folder, run_id, register(run_folder, run_id))


@pytest.fixture(scope="session")
def evaluated(cache) -> Callable[..., dict]:
    """`evaluated(source, output)`: the report on a model by the samples, without explanations unless asked for."""

    def evaluated(source: Path | str, output: Path, *, card: Path | None = None, **counts: int) -> dict:
        counts = {"explained": 0, **counts}
        return evaluate(str(source), DATA, cache, output, looks=output / "looks.jsonl", card=card, **counts)

    return evaluated
