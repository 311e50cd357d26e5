from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from contracts.evidence import AnswerSet, Evidence, Familiar, Similar
from handlers.build import BrokenArchive
from handlers.engines import Outputs
from handlers.errors import UnknownExample
from handlers.evidence.archive_evidence import NO_FEATURES, NOT_PACKED, ArchiveEvidence, load_evidence

STORE = {
    # Two images of class 0, and one each of classes 1 and 2.
    "features": np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32),
    "labels": np.array([0, 0, 1, 2], np.int32),
    "familiarity_scores": np.linspace(0.05, 1, 20, dtype=np.float32),
    "answer_set_scores": np.full(99, 0.75, np.float32),
}
WHOLE = Evidence(Familiar("max_probability", 0, 20), Similar(4, thumbnails=False, accuracy_kept=1.0), AnswerSet(99))
OUTPUTS = Outputs(np.array([[0.6, 0.3, 0.1], [0, 0.02, 0.98]], np.float32), np.array([[5, 0], [0, 2]], np.float32))


@pytest.fixture
def of(contract):
    """`of(evidence)`: what an archive of three classes with these settings gives."""

    def of(evidence, store=STORE):
        return ArchiveEvidence(replace(contract, classes=("cat", "dog", "frog"), evidence=evidence), store)

    return of


def test_similar_images_are_of_the_answers_class_and_of_the_runner_ups_nearest_first(of):
    found = of(WHOLE).similar(OUTPUTS, 0, 1)
    assert [(other["id"], other["class"], other["similarity"]) for other in found] == [(0, "cat", 1), (2, "dog", 0)]
    assert [other["class"] for other in of(WHOLE).similar(OUTPUTS, 1, 5)] == ["dog", "frog"]


def test_an_answer_set_names_its_classes_with_their_confidences_likeliest_first(of):
    assert of(WHOLE).answer_set(OUTPUTS.probabilities[0], 0.9) == [
        {"class": "cat", "confidence": 0.6},
        {"class": "dog", "confidence": 0.3},
    ]


def test_familiarity_is_given_for_each_image_and_judged_by_the_contracts_share(of):
    assert of(WHOLE).familiarity(OUTPUTS).tolist() == pytest.approx([0.6, 0.95], abs=0.051)
    assert of(WHOLE).is_familiar(0.05)
    assert not of(WHOLE).is_familiar(0.04)


def test_a_part_that_could_not_be_made_gives_the_contracts_reason(of):
    evidence = of(Evidence(absent=(("similar", "the data set has one class"),)))
    assert evidence.similar(OUTPUTS, 0, 3) == {"unavailable": "the data set has one class"}
    assert evidence.familiarity(OUTPUTS) is None
    assert not evidence.is_familiar(1.0)


def test_an_archive_without_evidence_says_to_pack_it_again(of):
    evidence = of(None, None)
    assert evidence.similar(OUTPUTS, 0, 3) == {"unavailable": NOT_PACKED}
    assert evidence.answer_set(OUTPUTS.probabilities[0], 0.9) == {"unavailable": NOT_PACKED}
    with pytest.raises(UnknownExample, match="packed without thumbnails"):
        evidence.example(0)


def test_an_engine_without_features_leaves_answer_sets_alone(of):
    bare = Outputs(OUTPUTS.probabilities)
    assert of(WHOLE).similar(bare, 0, 3) == {"unavailable": NO_FEATURES}
    assert of(WHOLE).familiarity(bare) is None
    assert of(WHOLE).why_absent("familiar") == {"unavailable": NO_FEATURES}
    assert len(of(WHOLE).answer_set(bare.probabilities[0], 0.9)) == 2


def test_evidence_that_the_contract_promises_must_be_in_the_archive(contract, tmp_path):
    assert load_evidence(tmp_path, contract).why_absent("similar") == {"unavailable": NOT_PACKED}
    with pytest.raises(BrokenArchive, match=r"evidence\.safetensors"):
        load_evidence(tmp_path, replace(contract, evidence=WHOLE))
