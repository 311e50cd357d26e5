"""Heatmaps in closed form are those of pytorch-grad-cam, and about the class."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional

from contracts.model import Explanation
from handlers.evidence.heatmaps import FORWARD_METHODS, class_shares, heatmap, resize
from handlers.explain import Explainer
from handlers.network import build_network

CLASSES, SIZE = 5, (32, 24)


class Outputs(NamedTuple):
    maps: np.ndarray | None
    sharpness: np.ndarray | None


@pytest.fixture(scope="module")
def outputs() -> Outputs:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((3, CLASSES, 4, 3)).astype(np.float32)
    return Outputs(maps, rng.random((3, 8, 6)).astype(np.float32))


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return build_network("resnet18_small", CLASSES).eval()


@pytest.mark.parametrize("targets", [[0, 3, 4], [2, 2, 1]])
def test_cam_is_grad_cam_of_the_last_layer(network, targets):
    images = np.random.default_rng(2).standard_normal((3, 3, *SIZE)).astype(np.float32)
    activations = last_activations(network, images)
    with torch.no_grad():  # so that no random class is supported everywhere, or nowhere
        mean = activations.mean((0, 2, 3))
        network.fc.weight -= torch.outer(network.fc.weight @ mean, mean) / (mean @ mean)
    maps = torch.einsum("ck,nkhw->nchw", network.fc.weight, activations).detach().numpy()
    heat, _ = heatmap(Outputs(maps, np.ones((3, 1, 1), np.float32)), np.array(targets), "cam", SIZE)
    explainer = Explainer(network, Explanation("layer4", "gradcam", ("gradcam",)), device=torch.device("cpu"))
    expected = explainer.heatmaps(images, targets, "gradcam")
    # pytorch-grad-cam also shifts each map's minimum to 0; ours keeps 0 for "no support".
    heat = (heat - heat.min((1, 2), keepdims=True)) / np.ptp(heat, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(heat, expected, atol=1e-4)


def last_activations(network: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = network.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        network(torch.from_numpy(images))
    hook.remove()
    return kept[0]


def test_strength_of_cam_is_the_class_maps_maximum_in_logits(outputs):
    maps = outputs.maps.copy()
    maps[:, 1] = 0
    maps[:, 1, 1:3, :2] = 3  # so large that the maximum is met between centres
    heat, strength = heatmap(outputs._replace(maps=maps), np.array([1, 1, 1]), "cam", SIZE)
    np.testing.assert_allclose(strength, 3, rtol=1e-6)
    np.testing.assert_allclose(heat.max((1, 2)), 1)


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_heat_is_from_0_to_1_at_the_size_asked_for(method, outputs):
    heat, strength = heatmap(outputs, np.array([0, 1, 2]), method, SIZE)
    assert heat.shape == (3, *SIZE)
    assert heat.dtype == strength.dtype == np.float32
    assert heat.min() >= 0
    np.testing.assert_allclose(heat.max((1, 2)), 1)
    assert (strength > 0).all()


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_a_class_that_nothing_supports_has_no_heat_and_no_strength(method, outputs):
    heat, strength = heatmap(outputs._replace(maps=-np.abs(outputs.maps)), np.array([0, 1, 2]), method, SIZE)
    assert not heat.any()
    assert not strength.any()


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_heat_of_an_image_does_not_depend_on_its_batch(method, outputs):
    targets = np.array([4, 0, 2])
    whole, strengths = heatmap(outputs, targets, method, SIZE)
    for index in range(3):
        alone = Outputs(outputs.maps[index : index + 1], outputs.sharpness[index : index + 1])
        heat, strength = heatmap(alone, targets[index : index + 1], method, SIZE)
        np.testing.assert_allclose(heat[0], whole[index], atol=1e-6)
        np.testing.assert_allclose(strength, strengths[index], rtol=1e-5)


def test_sharpcam_is_cam_where_the_early_layer_is_active(outputs):
    half = np.ones((3, 8, 6), np.float32)
    half[:, :, 3:] = 0
    heat, _ = heatmap(Outputs(np.ones((3, CLASSES, 4, 3), np.float32), half), np.array([0, 1, 2]), "sharpcam", SIZE)
    np.testing.assert_allclose(heat[:, :, : SIZE[1] // 2 - 2], 1)
    assert not heat[:, :, SIZE[1] // 2 + 2 :].any()


def test_contrastcam_gives_a_place_to_the_class_with_the_most_support():
    """Both classes see both halves, each one more than the other: cam shows all, contrastcam one half."""
    maps = np.full((1, CLASSES, 4, 4), -1, np.float32)
    maps[0, 0], maps[0, 1] = [2, 2, 1.5, 1.5], [1.5, 1.5, 2, 2]
    outputs = Outputs(maps, np.ones((1, 4, 4), np.float32))
    for target, own in ((0, slice(0, 2)), (1, slice(2, 4))):
        shared, _ = heatmap(outputs, np.array([target]), "cam", (4, 4))
        contrast, _ = heatmap(outputs, np.array([target]), "contrastcam", (4, 4))
        assert shared[..., own].sum() / shared.sum() < 0.6
        assert contrast[..., own].sum() / contrast.sum() > 0.8


def test_class_shares_sum_to_1_and_are_equal_without_any_difference(outputs):
    np.testing.assert_allclose(class_shares(outputs.maps).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(class_shares(np.ones((1, CLASSES, 2, 2), np.float32)), 1 / CLASSES)


@pytest.mark.parametrize("size", [(32, 32), (7, 5), (4, 3), (3, 2)])
def test_resize_is_bilinear_as_pytorchs(size, outputs):
    maps = outputs.maps[:, 0]
    expected = functional.interpolate(torch.from_numpy(maps)[:, None], size, mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(resize(maps, size), expected, atol=1e-5)


def test_unknown_methods_and_networks_without_class_maps_are_refused(outputs):
    with pytest.raises(ValueError, match="use one of cam, sharpcam, contrastcam"):
        heatmap(outputs, np.array([0, 1, 2]), "gradcam", SIZE)
    with pytest.raises(ValueError, match="with a backward pass"):
        heatmap(Outputs(None, None), np.array([0]), "cam", SIZE)
    with pytest.raises(ValueError, match="gives no sharpcam"):
        heatmap(outputs._replace(sharpness=None), np.array([0, 1, 2]), "sharpcam", SIZE)
    assert heatmap(outputs._replace(sharpness=None), np.array([0, 1, 2]), "cam", SIZE)[0].any()


def test_the_module_needs_numpy_alone():
    code = "import sys, handlers.evidence.heatmaps; print({'torch', 'cv2', 'matplotlib', 'scipy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
