from __future__ import annotations

import numpy as np
import pytest
import torch

from handlers.engines.eager import EagerEngine
from handlers.errors import EngineError


def eager(network, precision="fp32", temperature=1.0, sharp_layer=None):
    return EagerEngine(
        network, precision=precision, temperature=temperature, device=torch.device("cpu"), sharp_layer=sharp_layer
    )


def test_the_eager_engine_computes_the_network(network, images):
    with torch.inference_mode():
        expected = torch.softmax(network(torch.from_numpy(images)), dim=1)
    np.testing.assert_allclose(eager(network).run(images).probabilities, expected, atol=1e-5)


def test_bf16_is_close_to_fp32_and_leaves_the_network_in_fp32(network, images):
    full = eager(network).run(images).probabilities
    half = eager(network, "bf16").run(images).probabilities
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.03)
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_the_temperature_belongs_to_the_engine(network, images):
    sharp = eager(network, temperature=0.25).run(images).probabilities
    assert sharp.max() > eager(network).run(images).probabilities.max()


def test_the_forward_pass_that_answers_gives_what_evidence_is_made_of(network, images, check_evidence):
    check_evidence(eager(network, sharp_layer="layer3").run(images), network, images)


def test_a_network_without_a_linear_head_after_a_global_mean_gives_probabilities_alone(images):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].size, 4)).eval()
    outputs = eager(network, sharp_layer="0").run(images)
    assert outputs.probabilities.shape == (len(images), 4)
    assert outputs.maps is None


def test_an_unknown_precision_is_refused_with_those_that_exist(network):
    with pytest.raises(EngineError, match="computes in fp32 or bf16, not in 'int4'"):
        eager(network, "int4")
