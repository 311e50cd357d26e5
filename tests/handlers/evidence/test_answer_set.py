from __future__ import annotations

import math

import numpy as np
import pytest

from handlers.evidence.answer_set import AnswerSets, conformal_scores, is_member


def calibrated(scores: list[float]) -> AnswerSets:
    return AnswerSets({"answer_set_scores": np.sort(np.array(scores, np.float32))})


@pytest.mark.parametrize(("coverage", "rank"), [(0.5, 10), (0.8, 16), (0.95, 19), (0.951, None), (0.999, None)])
def test_the_threshold_is_the_score_at_the_finite_sample_rank(coverage, rank):
    sets = calibrated([number / 100 for number in range(1, 20)])  # n = 19: 20 · 0.95 = 19, the last
    assert sets.threshold(coverage) == (math.inf if rank is None else pytest.approx(rank / 100))


def test_members_come_likeliest_first():
    sets = calibrated([0.75] * 99)
    assert sets.members(np.array([[0.25, 0.3, 0.05, 0.4]], np.float32), 0.9) == [[3, 1, 0]]


def test_no_set_is_empty():
    sets = calibrated([0.01] * 99)
    assert sets.members(np.array([[0.4, 0.6], [0.995, 0.005]], np.float32), 0.9) == [[1], [0]]


def test_too_few_held_out_images_for_the_coverage_give_all_classes():
    assert calibrated([0.1] * 10).members(np.array([[0.1, 0.9]], np.float32), 0.99) == [[1, 0]]


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_the_right_class_is_a_member_as_often_as_asked(coverage):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(5, 0.5), 40_000).astype(np.float32)
    labels = np.array([rng.choice(5, p=row / row.sum()) for row in probabilities.astype(np.float64)])
    own = conformal_scores(probabilities)[np.arange(len(labels)), labels]
    sets = AnswerSets({"answer_set_scores": np.sort(own[:20_000])})
    within = is_member(probabilities[20_000:], sets.threshold(coverage))
    assert within[np.arange(20_000), labels[20_000:]].mean() == pytest.approx(coverage, abs=0.01)
    served = sets.members(probabilities[20_000:], coverage)
    covered = np.mean([label in members for label, members in zip(labels[20_000:], served, strict=True)])
    assert covered >= coverage - 0.01
