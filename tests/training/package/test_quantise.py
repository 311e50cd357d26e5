from __future__ import annotations

import json

import numpy as np
import pytest

from contracts.model import Engine
from handlers.engines import build_engine
from handlers.errors import EngineError
from handlers.preprocess import normalise
from training.evaluate.inference import predict_logits
from training.package.engine_gate import GATE, add_engine

CLASSES = ("cat", "dog", "frog")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05), ("int8", 0.2)])
def test_openvino_answers_like_the_network(precision, tolerance, network, contract, images, tmp_path):
    report = add_engine(
        network,
        contract,
        tmp_path,
        choice=Engine("openvino", precision),
        training=images,
        held_out=images,
        logits=predict_logits(network, images.images, contract.input).numpy(),
        max_drop=1.0,
    )
    assert report.engine == Engine("openvino", precision, report.measured.temperature)
    assert report.calibration_images == (48 if precision == "int8" else 0)
    prepared = normalise(images.images, contract.input)
    full = build_engine(Engine(), lambda: network, directory=tmp_path, device="cpu").run(prepared).probabilities
    engine = build_engine(Engine("openvino", precision), lambda: network, directory=tmp_path, device="cpu")
    for length in (1, 5, 48):
        np.testing.assert_allclose(engine.run(prepared[:length]).probabilities, full[:length], atol=tolerance)
    written = json.loads((tmp_path / GATE).read_text())
    assert written["passed"] is True
    assert written["measured"]["accuracy"] == report.measured.accuracy
    assert set(written["agreement_by_class"]) == set(CLASSES)


def test_missing_engine_files_and_unknown_precisions_are_refused(network, tmp_path):
    for precision in ("int8", "int4"):
        with pytest.raises(EngineError):
            build_engine(Engine("openvino", precision), lambda: network, directory=tmp_path, device="cpu")
