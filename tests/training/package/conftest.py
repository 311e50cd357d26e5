"""A small random network and images that it answers rightly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from contracts.model import Contract, Engine, Input
from handlers.engines import build_engine
from handlers.network import build_network
from handlers.preprocess import normalise
from training.data.images import Images

CLASSES = ("cat", "dog", "frog")


@pytest.fixture(scope="package")
def contract():
    return Contract("tiny", "1", CLASSES, Input(16, 16, (0.5,) * 3, (0.25,) * 3), "resnet18_small")


@pytest.fixture(scope="package")
def network():
    torch.manual_seed(0)
    return build_network("resnet18_small", 3).eval()


@pytest.fixture(scope="package")
def images(contract, network):
    """Noise, labelled with what the network answers: it is right on all of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    answers = (
        build_engine(Engine(), lambda: network, directory=Path(), device="cpu")
        .run(normalise(pixels, contract.input))
        .probabilities
    )
    return Images(pixels, answers.argmax(1).astype(np.int64), CLASSES)
