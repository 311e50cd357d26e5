from __future__ import annotations

import numpy as np
import pytest
import torch

from handlers.engines.base import OPENVINO_FILES
from handlers.engines.openvino import OpenVINOEngine
from handlers.errors import EngineError
from training.package.quantise import write_graph

FILE = OPENVINO_FILES["fp32"]


def engine(folder):
    return OpenVINOEngine(folder, precision="fp32", temperature=1.0)


@pytest.fixture(scope="module")
def expected(network, images):
    with torch.inference_mode():
        return torch.softmax(network(torch.from_numpy(images)), dim=1).numpy()


def test_batches_of_changing_length_have_the_networks_answers(logits_alone, images, expected):
    served = engine(logits_alone)
    for length in (1, 4, 2, len(images), 1):
        np.testing.assert_allclose(served.run(images[:length]).probabilities, expected[:length], atol=2e-3)
    first, _second = served.run(images[:1]).probabilities, served.run(images[1:2]).probabilities
    np.testing.assert_allclose(first, expected[:1], atol=2e-3)  # an answer outlives the next question


def test_images_written_into_the_engines_own_memory_have_the_same_answers(logits_alone, images):
    served = engine(logits_alone)
    for length in (2, 6, 3):
        own = served.buffer(length)
        own[:] = images[-length:]
        np.testing.assert_array_equal(served.run(own).probabilities, served.run(images[-length:]).probabilities)


def test_the_forward_pass_that_answers_gives_what_evidence_is_made_of(network, images, tmp_path, check_evidence):
    write_graph(network, tmp_path / FILE, images[:0], images.shape[2:], sharp_layer="layer3")
    served = engine(tmp_path)
    for length in (len(images), 1):
        check_evidence(served.run(images[:length]), network, images[:length])


def test_a_graph_of_logits_alone_as_in_earlier_releases_gives_probabilities_alone(logits_alone, images):
    outputs = engine(logits_alone).run(images)
    assert outputs.probabilities.shape == (len(images), 10)
    assert outputs[1:] == (None, None, None)


def test_the_temperature_divides_the_logits_in_the_graph(logits_alone, images, expected):
    sharp = OpenVINOEngine(logits_alone, precision="fp32", temperature=0.25).run(images).probabilities
    powers = expected.astype(np.float64) ** 4
    np.testing.assert_allclose(sharp, powers / powers.sum(axis=1, keepdims=True), atol=5e-3)


def test_a_missing_file_and_an_unknown_precision_are_refused_by_name(tmp_path):
    with pytest.raises(EngineError, match=r"openvino cannot run openvino-int8\.xml"):
        OpenVINOEngine(tmp_path, precision="int8", temperature=1.0)
    with pytest.raises(EngineError, match="computes in fp32, bf16, int8, not in 'int4'"):
        OpenVINOEngine(tmp_path, precision="int4", temperature=1.0)
