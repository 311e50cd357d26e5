from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from contracts.model import Engine, Explanation
from handlers.engines import build_engine
from handlers.errors import EngineError
from handlers.preprocess import normalise
from training.data.images import Images
from training.evaluate.inference import predict_logits
from training.package.engine_gate import GATE, GateRefused, _compare, add_engine, remove_engines

CLASSES = ("cat", "dog", "frog")


def test_the_gate_refuses_what_loses_more_than_the_bound():
    labels = np.arange(1000) % 3
    right = np.eye(3, dtype=np.float32)[labels] * 5
    worse = right.copy()
    worse[:4] = np.roll(worse[:4], 1, axis=1)  # 0.4 points
    data = Images(np.zeros((1000, 1, 1, 3), dtype=np.uint8), labels, CLASSES)
    report = _compare(right, worse, data, Engine("openvino", "int8"), calibration_images=0, max_drop=0.003)
    assert report.drop == pytest.approx(0.004)
    assert report.agreement == pytest.approx(0.996)
    assert not report.passed
    assert "loses 0.40 points" in str(GateRefused(report))
    assert _compare(right, worse, data, Engine("openvino", "int8"), calibration_images=0, max_drop=0.0041).passed


def test_the_gate_refuses_an_engine_whose_heatmaps_differ():
    labels = np.arange(30) % 3
    logits = np.eye(3, dtype=np.float32)[labels]
    data = Images(np.zeros((30, 1, 1, 3), dtype=np.uint8), labels, CLASSES)
    report = _compare(logits, logits, data, Engine("openvino", "int8"), calibration_images=0, max_drop=0.003)
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
        choice=Engine("openvino"),
        training=images,
        held_out=images,
        logits=predict_logits(network, images.images, contract.input).numpy(),
    )
    assert report.heatmap_correlation > 0.99
    assert json.loads((tmp_path / GATE).read_text())["heatmap_correlation"] == report.heatmap_correlation
    outputs = build_engine(report.engine, None, directory=tmp_path, device="cpu").run(
        normalise(images.images[:2], contract.input)
    )
    assert outputs.maps.shape[:2] == (2, 3)


def test_a_refused_engine_leaves_its_report(network, contract, images, tmp_path):
    with pytest.raises(GateRefused):
        add_engine(
            network,
            contract,
            tmp_path,
            choice=Engine("openvino"),
            training=images,
            held_out=images,
            logits=predict_logits(network, images.images, contract.input).numpy(),
            max_drop=-1.0,
        )
    assert json.loads((tmp_path / GATE).read_text())["passed"] is False
    remove_engines(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_nobody_wrote_files_for_is_refused(network, contract, images, tmp_path):
    logits = predict_logits(network, images.images, contract.input).numpy()
    with pytest.raises(EngineError, match="no files of its own"):
        add_engine(network, contract, tmp_path, choice=Engine("eager"), training=images, held_out=images, logits=logits)
