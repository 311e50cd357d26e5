from __future__ import annotations

import pytest
import torch
from torch import nn

from handlers.engines.with_evidence import WithEvidence, gives_evidence


def chain(pool: nn.Module, head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, head)


def test_a_chain_that_ends_in_a_global_mean_and_a_linear_head_gives_evidence():
    network = chain(nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2))
    assert gives_evidence(network, "0")
    assert gives_evidence(chain(nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(4, 2)), "1")


@pytest.mark.parametrize(
    ("pool", "head", "layer"),
    [
        (nn.AdaptiveMaxPool2d(1), nn.Linear(4, 2), "0"),
        (nn.AdaptiveAvgPool2d(2), nn.Linear(16, 2), "0"),
        (nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(4, 2)), "0"),
        (nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2), "2"),  # the pool itself has no places to sharpen
        (nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2), "layer3"),
        (nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2), None),
    ],
)
def test_other_networks_and_layers_give_none(pool, head, layer):
    assert not gives_evidence(chain(pool, head), layer)


def test_the_logits_are_the_networks_and_maps_average_to_them():
    torch.manual_seed(0)
    network = chain(nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2))
    network.insert(3, nn.Flatten())
    bare = nn.Sequential(network[0], network[1], network[2], network[4])
    images = torch.randn(3, 3, 8, 8)
    logits, features, maps, sharpness = WithEvidence(bare, "0")(images)
    torch.testing.assert_close(logits, network(images))
    assert (features.shape, maps.shape, sharpness.shape) == ((3, 4), (3, 2, 6, 6), (3, 6, 6))
    torch.testing.assert_close(maps.mean((2, 3)) + bare[3].bias, logits)
    torch.testing.assert_close(sharpness, network[0](images).square().mean(1).sqrt())
