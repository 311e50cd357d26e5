import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.evaluate.heatmaps.passes import Passes, by, explain, random_heat, run


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 24, 16)).astype(np.float32)


def test_a_pass_takes_images_of_any_size(network, noise):
    for images in (noise, np.tile(noise, (1, 1, 2, 2))):
        outputs = run(network, images)
        with torch.inference_mode():
            expected = torch.softmax(network(torch.from_numpy(images)), 1).numpy()
        np.testing.assert_allclose(outputs.probabilities, expected, atol=1e-5)
        assert outputs.sharpness.shape == (3, images.shape[2] // 4, images.shape[3] // 4)


@pytest.mark.parametrize("method", ["cam", "sharpcam", "contrastcam", "gradcam", "gradcam++"])
def test_every_method_gives_heatmaps_of_the_images_size(method, network, contract, noise):
    heat = explain(network, replace(contract.explain, method=method), noise, np.array([0, 1, 0]))
    assert heat.shape == (3, 24, 16)
    assert 0 <= heat.min() <= heat.max() <= 1 + 1e-5


def test_kept_passes_give_the_same_heatmaps_and_other_networks_their_own(network, contract, noise):
    passes, other = Passes(network), copy.deepcopy(network)
    with torch.no_grad():
        other.fc.weight.mul_(-1)
    for method in ("cam", "contrastcam", "gradcam"):
        choice = replace(contract.explain, method=method)
        for targets in (np.array([0, 1, 0]), np.array([1, 1, 0])):
            for net in (network, other):
                kept, own = (explained(net, noise, targets) for explained in (by(choice, passes), by(choice)))
                np.testing.assert_array_equal(kept, own)
    assert passes.outputs(noise, None) is passes.outputs(noise, "layer3")
    assert passes.outputs(noise, "layer2").sharpness.shape == (3, 12, 8)


def test_random_heat_is_the_same_for_the_same_question_and_another_for_another(noise):
    one, again = (random_heat(None, noise, np.array([0, 1, 0])) for _ in range(2))
    other = random_heat(None, noise, np.array([1, 1, 0]))
    np.testing.assert_array_equal(one, again)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
