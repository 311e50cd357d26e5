from __future__ import annotations

import pytest
import torch

from handlers.network import ARCHITECTURES, build_network

# After handlers.network, which declares what torchvision's import needs.
from torchvision.models import resnet18  # isort: skip


@pytest.fixture(scope="module", params=ARCHITECTURES)
def built(request):
    return request.param, build_network(request.param, 7)


def test_parameters_have_torchvisions_names_so_that_its_weights_load(built):
    _, network = built
    assert network.state_dict().keys() == resnet18(num_classes=7).state_dict().keys()
    assert network.fc.weight.shape == (7, 512)


def test_only_the_network_for_small_images_keeps_their_resolution(built):
    name, network = built
    seen = []
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert seen == [{"resnet18": (8, 8), "resnet18_small": (32, 32)}[name]]


def test_an_unknown_architecture_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="unknown architecture 'resnet81': use one of resnet18, resnet18_small"):
        build_network("resnet81", 10)
