"""The network that is served can learn the six classes, and the familiarity benchmark reads what it learnt."""

import numpy as np
import pytest
import torch

from benchmarks import familiar, six_classes
from training.data.images import CIFAR10_CLASSES, Images
from training.recipe import Augmentation, Recipe


@pytest.mark.long
def test_run_of_the_served_network_is_continued_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    rng = np.random.default_rng(0)
    known = Images(rng.integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60) % 6, CIFAR10_CLASSES[:6])
    monkeypatch.setattr(six_classes, "known_images", lambda: (known.pick(np.arange(48)), known.pick(np.arange(48, 60))))
    recipe = Recipe(
        name="six", epochs=2, batch_size=16, workers=0, sizes=((0.0, 8), (0.5, 0)), augmentation=Augmentation(0)
    )
    six_classes.train_served_network(recipe, tmp_path / "run")
    six_classes.train_served_network(recipe, tmp_path / "run")  # nothing is left to train
    about, features_of, head = familiar._served_network(tmp_path / "run")
    assert about.startswith("6 classes, resnet18_small, 2 epochs")
    with torch.inference_mode():
        assert head(features_of(torch.zeros(2, 3, 32, 32))).shape == (2, 6)
