from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from contracts.evidence import AnswerSet, Evidence, Familiar
from contracts.model import Contract
from handlers.evidence.store import EVIDENCE
from training.data.images import CIFAR10_INPUT
from training.evaluate.evidence import COVERAGES, MeasuredEvidence, measure_familiar

CONTRACT = Contract("x", "1", ("cat", "dog", "fox"), CIFAR10_INPUT, "resnet18_small")
WHOLE = Evidence(Familiar("max_probability", neighbours=0, images=4), answer_set=AnswerSet(99))


@pytest.fixture
def measured(tmp_path):
    scores = {"familiarity_scores": np.full(4, 0.7, np.float32), "answer_set_scores": np.full(99, 0.65, np.float32)}
    save_file(scores, tmp_path / EVIDENCE)
    return MeasuredEvidence(tmp_path, replace(CONTRACT, evidence=WHOLE))


def test_answer_sets_are_measured_by_the_rule_and_as_served(measured):
    """Here the rule makes a class of at least 35 % a member."""
    probabilities = np.array([[0.6, 0.3, 0.1], [0.34, 0.33, 0.33], [0.4, 0.5, 0.1], [0.9, 0.06, 0.04]], np.float32)
    rows = measured.measure_sets(probabilities, np.array([0, 0, 0, 1]))
    assert [row.pop("asked") for row in rows] == list(COVERAGES)
    assert rows[0] == {"coverage": 0.5, "empty": 0.25, "served_coverage": 0.75, "mean_size": 1.25}


def test_images_are_familiar_by_the_archives_scores(measured):
    probabilities = np.array([[0.9, 0.1, 0], [0.5, 0.5, 0]], np.float32)
    assert measured.familiar(probabilities, np.zeros((2, 1), np.float32)).tolist() == [True, False]
    assert measured.familiar(probabilities, None) is None


@pytest.mark.parametrize("contract", [CONTRACT, replace(CONTRACT, evidence=Evidence())])
def test_a_version_without_evidence_has_nothing_to_measure(contract, tmp_path):
    measured = MeasuredEvidence(tmp_path, contract)
    assert measured.familiar(np.ones((1, 3), np.float32), np.ones((1, 1), np.float32)) is None
    assert measured.measure_sets(np.ones((1, 3), np.float32), np.array([0])) == []


def test_accuracy_is_told_apart_for_familiar_images_and_the_others():
    familiar, right = np.array([True, True, True, False]), np.array([True, True, False, False])
    assert measure_familiar(familiar, right) == {
        "familiar": 0.75,
        "accuracy_of_familiar": 0.6667,
        "accuracy_of_unfamiliar": 0.0,
    }
    assert measure_familiar(np.array([True]), np.array([True]))["accuracy_of_unfamiliar"] is None
