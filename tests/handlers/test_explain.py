from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch.nn import functional

from contracts.model import ContractError, Explanation
from handlers.explain import METHODS, Explainer
from handlers.network import build_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own_network(contract):
    torch.manual_seed(1)
    return build_network(contract.architecture, len(contract.classes)).eval()


@pytest.fixture(scope="module")
def explainer(own_network):
    return Explainer(own_network, Explanation(layer="layer3", methods=tuple(METHODS)), device=CPU)


@pytest.fixture(scope="module")
def images(contract):
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 3, contract.input.height, contract.input.width)).astype(np.float32)


def scaled(heat: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1, (N, H, W)."""
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / (heat.amax((1, 2), keepdim=True) + 1e-7)


def closed_form(network, images, targets, weigh, layers=("layer3",)) -> np.ndarray:
    """A class activation map by autograd on captured features, without the library."""
    kept: list[torch.Tensor] = []
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output: kept.append(output))
        for name in layers
    ]
    logits = network(torch.from_numpy(images).requires_grad_())
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(logits[range(len(targets)), targets].sum(), kept)
    heats = [scaled(torch.relu(weigh(a, g)).detach()) for a, g in zip(kept, gradients, strict=True)]
    resized = [functional.interpolate(heat[:, None], images.shape[2:], mode="bilinear")[:, 0] for heat in heats]
    return scaled(torch.stack(resized).mean(0)).numpy()


def grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1)


@pytest.mark.parametrize(
    ("method", "weigh"),
    [
        ("gradcam", grad_cam),
        ("layercam", lambda a, g: (torch.relu(g) * a).sum(1)),
        ("hirescam", lambda a, g: (g * a).sum(1)),
    ],
)
def test_heatmaps_equal_the_closed_form(method, weigh, explainer, own_network, images):
    targets = [0, 3, 9]
    expected = closed_form(own_network, images, targets, weigh)
    np.testing.assert_allclose(explainer.heatmaps(images, targets, method), expected, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_maps_from_0_to_1_of_the_inputs_size(method, explainer, images):
    heat = explainer.heatmaps(images, [1, 2, 3], method)
    assert heat.shape == (3, *images.shape[2:])
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    np.testing.assert_allclose(heat.max((1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("layer", ["layer2+layer3", "layer3+layer2"])
def test_heatmaps_of_several_layers_are_averaged_whatever_their_order(layer, own_network, images):
    explainer = Explainer(own_network, Explanation(layer=layer), device=CPU)
    heat = explainer.heatmaps(images, [0, 3, 9], "gradcam")
    expected = closed_form(own_network, images, [0, 3, 9], grad_cam, layers=("layer2", "layer3"))
    np.testing.assert_allclose(heat, expected, atol=2e-3)
    assert not any(module._forward_hooks or module._backward_hooks for module in own_network.modules())


@pytest.mark.parametrize("method", METHODS)
def test_several_explained_together_equal_each_alone(method, explainer, images):
    together = explainer.heatmaps(images, [4, 5, 6], method)
    alone = [explainer.heatmaps(images[i : i + 1], [4 + i], method)[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=2e-3)


def test_the_target_class_decides_the_map(explainer, images):
    cat, ship = (explainer.heatmaps(images[:1], [target], "gradcam") for target in (3, 8))
    assert np.abs(cat - ship).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_explaining_leaves_no_hook_graph_or_gradient_behind(method, explainer, own_network, images):
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    explainer.heatmaps(images, [0, 1, 2], method)
    gc.freeze()  # all that exists now is left out
    before = tensors()
    for _ in range(3):
        explainer.heatmaps(images, [0, 1, 2], method)
    after = tensors()
    gc.unfreeze()
    assert after == before
    assert all(p.grad is None for p in own_network.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in own_network.modules())


def test_a_failing_explanation_leaves_no_hook_behind(explainer, own_network, images):
    with pytest.raises(IndexError):
        explainer.heatmaps(images, [0, 1, 99], "gradcam")
    assert not any(module._forward_hooks for module in own_network.modules())


@pytest.mark.parametrize(
    "choice",
    [
        Explanation(layer="layer9"),
        Explanation(layer="layer3+layer9"),
        Explanation(methods=("guess",)),
        Explanation(method="guess"),
    ],
)
def test_layers_and_methods_that_do_not_exist_are_refused_on_load(choice, own_network):
    with pytest.raises(ContractError):
        Explainer(own_network, choice, device=CPU)
