from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from contracts.model import Engine
from handlers.engines import MAX_BATCH, OPENVINO_FILES, Outputs, build_engine, predict_all, run_all, softmax
from handlers.errors import EngineError
from training.package.quantise import write_graph

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(contract):
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 3, contract.input.height, contract.input.width)).astype(np.float32)


def build(choice, network):
    return build_engine(choice, network, directory=Path(), device=CPU)


def test_softmax_is_torchs_at_the_temperature():
    logits = np.random.default_rng(0).normal(0, 30, (5, 10)).astype(np.float32)
    expected = torch.softmax(torch.from_numpy(logits) / 1.7, dim=1)
    np.testing.assert_allclose(softmax(logits, 1.7), expected, atol=1e-6)


def test_softmax_survives_huge_logits():
    assert softmax(np.array([[1e30, -1e30]], dtype=np.float32), 1.0).tolist() == [[1.0, 0.0]]


def test_the_eager_engine_computes_the_network(network, images):
    with torch.inference_mode():
        expected = torch.softmax(network(torch.from_numpy(images)), dim=1)
    np.testing.assert_allclose(build(Engine(), network).run(images).probabilities, expected, atol=1e-5)


def test_bf16_is_close_to_fp32_and_leaves_the_network_in_fp32(network, images):
    full = build(Engine(), network).run(images).probabilities
    half = build(Engine(precision="bf16"), network).run(images).probabilities
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.03)
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_openvino_computes_the_network_for_batches_of_changing_length(network, images, tmp_path):
    write_graph(network, tmp_path / OPENVINO_FILES["fp32"], images[:0], images.shape[2:])
    engine = build_engine(Engine("openvino"), None, directory=tmp_path, device=CPU)
    expected = build(Engine(), network).run(images).probabilities
    for length in (1, 4, 2, len(images), 1):
        np.testing.assert_allclose(engine.run(images[:length]).probabilities, expected[:length], atol=2e-3)
    first, _second = engine.run(images[:1]).probabilities, engine.run(images[1:2]).probabilities
    np.testing.assert_allclose(first, expected[:1], atol=2e-3)  # an answer outlives the next question
    for length in (2, 6, 3):
        own = engine.buffer(length)
        own[:] = images[-length:]
        np.testing.assert_array_equal(engine.run(own).probabilities, engine.run(images[-length:]).probabilities)


def check_evidence(outputs, network, images):
    """Hold the outputs against the definitions, computed by the network's own modules."""
    seen = {}
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


def test_engines_give_what_evidence_is_made_of_in_the_same_pass(network, images, tmp_path):
    eager = build_engine(Engine(), network, directory=tmp_path, device=CPU, sharp_layer="layer3")
    check_evidence(eager.run(images), network, images)
    write_graph(network, tmp_path / OPENVINO_FILES["fp32"], images[:0], images.shape[2:], sharp_layer="layer3")
    engine = build_engine(Engine("openvino"), None, directory=tmp_path, device=CPU)
    for length in (len(images), 1):
        check_evidence(engine.run(images[:length]), network, images[:length])


def test_a_graph_of_logits_alone_as_in_earlier_releases_gives_probabilities_alone(network, images, tmp_path):
    write_graph(network, tmp_path / OPENVINO_FILES["fp32"], images[:0], images.shape[2:])
    outputs = build_engine(Engine("openvino"), None, directory=tmp_path, device=CPU).run(images)
    assert outputs.probabilities.shape == (len(images), 10)
    assert outputs[1:] == (None, None, None)


def test_a_network_without_a_linear_head_after_a_global_mean_gives_probabilities_alone(images):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].size, 4)).eval()
    outputs = build_engine(Engine(), network, directory=Path(), device=CPU, sharp_layer="0").run(images)
    assert outputs.probabilities.shape == (len(images), 4)
    assert outputs.maps is None


def test_the_temperature_belongs_to_the_engine(network, images):
    sharp = build(replace(Engine(), temperature=0.25), network).run(images).probabilities
    assert sharp.max() > build(Engine(), network).run(images).probabilities.max()


@pytest.mark.parametrize("choice", [Engine("none"), Engine("eager", "int4")])
def test_engines_that_do_not_exist_are_refused(choice, network):
    with pytest.raises(EngineError):
        build(choice, network)


def test_many_images_are_split_into_forwards_and_stay_in_order(network, images):
    class Counting:
        """Tells each image by its first value and remembers how long its batches were."""

        lengths: list[int] = []  # noqa: RUF012

        def run(self, batch):
            self.lengths.append(len(batch))
            return Outputs(batch[:, 0, 0, :1], batch[:, 0, 0])

    many = np.zeros((2 * MAX_BATCH + 1, 3, 1, 1), dtype=np.float32)
    many[:, 0, 0, 0] = np.arange(len(many))
    assert predict_all(Counting(), many)[:, 0].tolist() == list(range(len(many)))
    assert Counting.lengths == [MAX_BATCH, MAX_BATCH, 1]
    outputs = run_all(Counting(), many)
    assert outputs.features[:, 0].tolist() == list(range(len(many)))
    assert outputs.maps is None
