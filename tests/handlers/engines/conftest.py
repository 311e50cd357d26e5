from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from handlers.engines import OPENVINO_FILES
from training.package.quantise import write_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from contracts.model import Contract
    from handlers.engines import Outputs


@pytest.fixture(scope="session")
def images(contract: Contract) -> np.ndarray:
    """Six prepared images of noise."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 3, contract.input.height, contract.input.width)).astype(np.float32)


@pytest.fixture(scope="session")
def logits_alone(network: torch.nn.Module, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an OpenVINO graph in fp32 that gives nothing but logits."""
    folder: Path = tmp_path_factory.mktemp("logits")
    write_graph(network, folder / OPENVINO_FILES["fp32"], images[:0], images.shape[2:])
    return folder


@pytest.fixture(scope="session")
def check_evidence() -> Callable[[Outputs, torch.nn.Module, np.ndarray], None]:
    """Holds outputs against their definitions, computed by the network's own modules."""

    def check(outputs: Outputs, network: torch.nn.Module, images: np.ndarray) -> None:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            getattr(network, name).register_forward_hook(lambda _, __, found, name=name: seen.update({name: found}))
            for name in ("layer3", "layer4")
        ]
        with torch.no_grad():
            logits = network(torch.from_numpy(images))
        for hook in hooks:
            hook.remove()
        maps = torch.einsum("ck,nkhw->nchw", network.fc.weight.detach(), seen["layer4"])
        np.testing.assert_allclose(outputs.probabilities, torch.softmax(logits, 1), atol=2e-3)
        np.testing.assert_allclose(outputs.features, seen["layer4"].mean((2, 3)), rtol=0.01, atol=2e-3)
        np.testing.assert_allclose(outputs.maps, maps, rtol=0.01, atol=5e-3)
        np.testing.assert_allclose(outputs.sharpness, seen["layer3"].pow(2).mean(1).sqrt(), rtol=0.01, atol=2e-3)
        # The mean of a class map is the class's logit without its bias.
        np.testing.assert_allclose(outputs.maps.mean((2, 3)) + network.fc.bias.detach().numpy(), logits, atol=5e-3)

    return check
