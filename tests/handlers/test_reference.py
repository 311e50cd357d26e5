from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from handlers.build import BrokenArchive
from handlers.reference import load_reference


@pytest.fixture
def write(tmp_path):
    """`write(**more)`: the folder of two reference images, of ten classes."""

    def write(**more):
        rows = np.eye(10)[[3, 5]].tolist()
        data = {"tolerance": 0.1, "images": ["YQ==", "Yg=="], "probabilities": rows, **more}
        (tmp_path / "reference.json").write_text(json.dumps(data))
        return tmp_path

    return write


def test_engine_and_fallback_have_outputs_and_tolerances_of_their_own_for_the_same_images(write, contract):
    folder = write(fallback={"tolerance": 0.01, "probabilities": np.eye(10)[[4, 6]].tolist()})
    engine = load_reference(folder, contract)
    fallback = load_reference(folder, contract, of_fallback=True)
    assert engine.images == fallback.images == (b"a", b"b")
    assert (engine.probabilities.argmax(1).tolist(), fallback.probabilities.argmax(1).tolist()) == ([3, 5], [4, 6])
    assert (engine.tolerance, fallback.tolerance) == (0.1, 0.01)
    assert engine.probabilities.dtype == np.float32


def test_a_fallback_without_outputs_is_refused(write, contract):
    with pytest.raises(BrokenArchive, match="no outputs of the fallback engine: pack the model again"):
        load_reference(write(), contract, of_fallback=True)


def test_a_reference_of_another_shape_is_refused(write, contract):
    with pytest.raises(BrokenArchive, match="expected 2 lists of 2 numbers"):
        load_reference(write(), replace(contract, classes=("a", "b")))


def test_a_missing_reference_is_refused(tmp_path, contract):
    with pytest.raises(BrokenArchive, match=r"reference\.json cannot be read"):
        load_reference(tmp_path, contract)
