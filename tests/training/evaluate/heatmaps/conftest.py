"""A toy: two classes, of which `square` is a bright upper left quarter."""

import numpy as np
import pytest
import torch

from contracts.model import Contract, Explanation, Input
from handlers.engines import Outputs
from handlers.network import build_network

SIDE = 16


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # several threads spin for one another where tests share the cores


class SquareEngine:
    """As sure of `square` as the image's upper left quarter is bright."""

    def run(self, images: np.ndarray) -> Outputs:
        square = images[:, :, : SIDE // 2, : SIDE // 2].mean((1, 2, 3))
        return Outputs(np.stack([square, 1 - square], axis=1).astype(np.float32))


@pytest.fixture(scope="session")
def engine() -> SquareEngine:
    return SquareEngine()


@pytest.fixture(scope="session")
def contract() -> Contract:
    explain = Explanation("layer4", "contrastcam", ("contrastcam", "gradcam", "eigencam"), sharp_layer="layer3")
    size = Input(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
    return Contract("toy", "0", ("square", "nothing"), size, "resnet18_small", explain)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    images = np.zeros((4, 3, SIDE, SIDE), np.float32)
    images[:, :, : SIDE // 2, : SIDE // 2] = 1
    return images


@pytest.fixture(scope="session")
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return build_network("resnet18_small", 2).eval()
