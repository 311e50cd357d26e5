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
