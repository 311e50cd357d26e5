from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from contracts.model import Contract, Engine, Explanation, Input
from handlers.engines import build_engine
from handlers.errors import EngineError
from handlers.network import build_network
from handlers.preprocess import normalise
from training.data.images import Images
from training.evaluate.inference import predict_logits
from training.package.quantise import GATE, GateRefused, _compare, add_engine, remove_engines

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "frog")


@pytest.fixture(scope="module")
def contract():
    return Contract("tiny", "1", CLASSES, Input(16, 16, (0.5,) * 3, (0.25,) * 3), "resnet18_small")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network("resnet18_small", 3).eval()


@pytest.fixture(scope="module")
def images(contract, network):
    """Noise, labelled with what the network answers: it is right on all of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    answers = (
        build_engine(Engine(), network, directory=Path(), device=CPU)
        .run(normalise(pixels, contract.input))
        .probabilities
    )
    return Images(pixels, answers.argmax(1).astype(np.int64), CLASSES)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05), ("int8", 0.2)])
def test_openvino_answers_like_the_network(precision, tolerance, network, contract, images, tmp_path):
    report = add_engine(
        network,
        contract,
        tmp_path,
        precision=precision,
        training=images,
        held_out=images,
        logits=predict_logits(network, images.images, contract.input).numpy(),
        max_drop=1.0,
    )
    assert report.engine == Engine("openvino", precision, report.measured.temperature)
    assert report.calibration_images == (48 if precision == "int8" else 0)
    prepared = normalise(images.images, contract.input)
    full = build_engine(Engine(), network, directory=tmp_path, device=CPU).run(prepared).probabilities
    engine = build_engine(Engine("openvino", precision), network, directory=tmp_path, device=CPU)
    for length in (1, 5, 48):
        np.testing.assert_allclose(engine.run(prepared[:length]).probabilities, full[:length], atol=tolerance)
    written = json.loads((tmp_path / GATE).read_text())
    assert written["passed"] is True
    assert written["measured"]["accuracy"] == report.measured.accuracy
    assert set(written["agreement_by_class"]) == set(CLASSES)


def test_the_gate_refuses_what_loses_more_than_the_bound():
    labels = np.arange(1000) % 3
    right = np.eye(3, dtype=np.float32)[labels] * 5
    worse = right.copy()
    worse[:4] = np.roll(worse[:4], 1, axis=1)  # 0.4 points
    data = Images(np.zeros((1000, 1, 1, 3), dtype=np.uint8), labels, CLASSES)
    report = _compare(right, worse, data, precision="int8", calibration_images=0, max_drop=0.003)
    assert report.drop == pytest.approx(0.004)
    assert report.agreement == pytest.approx(0.996)
    assert not report.passed
    assert "loses 0.40 points" in str(GateRefused(report))
    assert _compare(right, worse, data, precision="int8", calibration_images=0, max_drop=0.0041).passed


def test_the_gate_refuses_an_engine_whose_heatmaps_differ():
    labels = np.arange(30) % 3
    logits = np.eye(3, dtype=np.float32)[labels]
    data = Images(np.zeros((30, 1, 1, 3), dtype=np.uint8), labels, CLASSES)
    report = _compare(logits, logits, data, precision="int8", calibration_images=0, max_drop=0.003)
    assert report.passed
    assert replace(report, heatmap_correlation=0.95).passed
    other = replace(report, heatmap_correlation=0.9)
    assert not other.passed
    assert "median rank correlation of 0.9 " in str(GateRefused(other))


def test_an_engine_with_evidence_is_compared_by_its_heatmaps(network, contract, images, tmp_path):
    report = add_engine(
        network,
        replace(contract, explain=Explanation(sharp_layer="layer3")),
        tmp_path,
        precision="fp32",
        training=images,
        held_out=images,
        logits=predict_logits(network, images.images, contract.input).numpy(),
    )
    assert report.heatmap_correlation > 0.99
    assert json.loads((tmp_path / GATE).read_text())["heatmap_correlation"] == report.heatmap_correlation
    outputs = build_engine(report.engine, None, directory=tmp_path, device=CPU).run(
        normalise(images.images[:2], contract.input)
    )
    assert outputs.maps.shape[:2] == (2, 3)


def test_a_refused_engine_leaves_its_report(network, contract, images, tmp_path):
    with pytest.raises(GateRefused):
        add_engine(
            network,
            contract,
            tmp_path,
            precision="fp32",
            training=images,
            held_out=images,
            logits=predict_logits(network, images.images, contract.input).numpy(),
            max_drop=-1.0,
        )
    assert json.loads((tmp_path / GATE).read_text())["passed"] is False
    remove_engines(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_engine_files_and_unknown_precisions_are_refused(network, tmp_path):
    for precision in ("int8", "int4"):
        with pytest.raises(EngineError):
            build_engine(Engine("openvino", precision), network, directory=tmp_path, device=CPU)
