"""The gateway's documents become dataclasses; what a version cannot give is neither true nor false."""

from __future__ import annotations

import numpy as np
import pytest

from gradserve import AnswerSet, ClassConfidence, ModelVersion, RegionTest, Similar, Target, Unavailable
from gradserve.answers import parse_evidence


def test_evidence_has_every_part_of_the_document(document) -> None:
    evidence = parse_evidence(document())
    assert (evidence.class_name, evidence.confidence, evidence.method) == ("cat", 0.9, "contrastcam")
    assert evidence.target == Target("dog", 0.05)
    assert (evidence.strength, evidence.familiar, evidence.familiarity) == (3.5, True, 0.8)
    assert evidence.similar == (Similar(7, "cat", 0.93, "/models/cifar10/versions/1.0.0/examples/7.png"),)
    assert evidence.answer_set == AnswerSet((ClassConfidence("cat", 0.9), ClassConfidence("dog", 0.05)))
    assert evidence.answer_set.class_names == ("cat", "dog")
    assert evidence.test == RegionTest(0.4, 0.01, "The hot region decides.")
    assert (evidence.model, evidence.request_id) == (ModelVersion("cifar10", "1.0.0"), "r1")


def test_heatmap_is_the_same_from_base64_and_from_rows(document) -> None:
    packed = parse_evidence(document()).heatmap
    rows = parse_evidence(document(heatmap=[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]])).heatmap
    np.testing.assert_allclose(packed.array(), rows.array(), atol=1e-6)
    assert packed.array().shape == (2, 3)
    assert packed.array().dtype == np.float32


def test_heatmap_as_image_is_white_where_the_heat_is_one(document) -> None:
    image = parse_evidence(document()).heatmap.image()
    assert (image.size, image.mode) == ((3, 2), "L")
    assert (image.getpixel((0, 0)), image.getpixel((2, 1))) == (0, 255)


def test_heatmap_that_does_not_fill_its_size_is_refused(document) -> None:
    with pytest.raises(ValueError, match="1 values for 2 x 2"):
        parse_evidence(document(heatmap={"height": 2, "width": 2, "values": "AA=="}))


def test_what_was_not_asked_for_is_none(document) -> None:
    asked = {name: value for name, value in document().items() if name not in ("heatmap", "classes", "test")}
    evidence = parse_evidence(asked)
    assert (evidence.heatmap, evidence.answer_set, evidence.test) == (None, None, None)


def test_part_of_a_version_without_evidence_is_unavailable_with_the_reason(document) -> None:
    reason = "this version was packed without evidence: pack it again with gradserve package"
    missing = ("strength", "familiar", "familiarity", "similar", "classes", "test")
    evidence = parse_evidence(document(**{name: {"unavailable": reason} for name in missing}))
    parts = (evidence.strength, evidence.familiar, evidence.familiarity, evidence.similar, evidence.answer_set)
    assert all(part == Unavailable(reason) for part in (*parts, evidence.test))


def test_unavailable_is_not_taken_for_a_no(document) -> None:
    evidence = parse_evidence(document(familiar={"unavailable": "packed without evidence"}))
    with pytest.raises(TypeError, match="packed without evidence"):
        bool(evidence.familiar)


def test_document_of_an_earlier_gateway_is_read() -> None:
    heat = {"class": "cat", "confidence": 0.9, "target": "dog", "method": "gradcam", "heatmap": [[0.0, 1.0]]}
    evidence = parse_evidence({**heat, "layer": "layer4", "model": {"name": "m", "version": "1"}, "request_id": "r"})
    assert evidence.target == Target("dog", None)
    assert isinstance(evidence.similar, Unavailable)
    assert evidence["layer"] == "layer4"
