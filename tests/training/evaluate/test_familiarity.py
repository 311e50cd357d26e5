from __future__ import annotations

import numpy as np
import pytest

from handlers.engines import softmax
from handlers.evidence.familiar import METHODS
from handlers.evidence.store import unit_vectors
from training.evaluate.familiarity import (
    FEWEST,
    LEFT_OUT,
    WRONG,
    Answers,
    Known,
    auroc,
    compare_methods,
    fit_methods,
    fpr_at_95,
    nearest_neighbour_accuracy,
    score,
)

CLASSES, SIZE = 4, 8
HEAD = np.eye(CLASSES, SIZE, dtype=np.float32) * 2, np.zeros(CLASSES, np.float32)


def draw(count: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features around one axis for each class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    features = np.abs(3 * np.eye(CLASSES, SIZE)[labels] + rng.normal(0, spread, (count, SIZE)))
    return features.astype(np.float32), labels


def answers(features: np.ndarray) -> Answers:
    return Answers(softmax(features @ HEAD[0].T + HEAD[1], 1.0), features)


@pytest.fixture(scope="module")
def known() -> Known:
    features, labels = draw(400, 0.5, seed=0)
    order = np.argsort(labels, kind="stable")[::4]
    return Known(features, labels, unit_vectors(features)[order], labels[order].astype(np.int32), *HEAD)


def test_auroc_counts_pairs_in_the_right_order_and_ties_half():
    assert auroc(np.array([3, 2]), np.array([1, 0])) == 1
    assert auroc(np.array([1, 2]), np.array([1, 0])) == 0.875
    assert auroc(np.array([0, 1]), np.array([2, 3])) == 0


def test_fpr_is_the_share_of_the_unfamiliar_that_95_of_100_familiar_ones_do_not_beat():
    assert fpr_at_95(np.arange(100), np.array([0, 4, 5, 50])) == pytest.approx(0.5, abs=0.26)
    assert fpr_at_95(np.arange(100), np.array([-1, 1])) == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tells_images_far_from_training_ones(known, method):
    familiar = answers(draw(200, 0.5, seed=1)[0])
    unfamiliar = answers(np.abs(np.random.default_rng(2).normal(0, 0.5, (200, SIZE))).astype(np.float32))
    store = fit_methods(known)
    assert auroc(score(method, 5, store, familiar), score(method, 5, store, unfamiliar)) > 0.8


def test_the_best_candidate_comes_first_and_near_images_count_as_much_as_far_ones(known):
    features, labels = draw(400, 1.5, seed=3)
    # Far images that are surely of a class by the head, and lie where no training image does.
    far = np.zeros((50, SIZE), np.float32)
    far[:, 0], far[:, CLASSES:] = 6, 6
    found = compare_methods(known, answers(features), labels, {"sure": answers(far)})
    assert found[0].score == max(candidate.score for candidate in found)
    by_method = {candidate.method: candidate for candidate in found}
    assert by_method["mahalanobis"].far["sure"] > 0.9 > by_method["max_probability"].far["sure"]
    for candidate in found:
        assert set(candidate.near) == {LEFT_OUT, WRONG}
        mean_near = np.mean(list(candidate.near.values()))
        assert candidate.score == pytest.approx((candidate.far["sure"] + mean_near) / 2, abs=1e-4)


def test_a_class_that_is_left_out_is_gone_from_all_that_the_methods_know(known):
    without = known.without(1)
    assert 1 not in without.labels
    assert 1 not in without.index_labels
    assert without.weight.tolist() == HEAD[0][[0, 2, 3]].tolist()


def test_too_few_held_out_images_leave_near_ones_out(known):
    features, labels = draw(FEWEST, 0.1, seed=4)
    found = compare_methods(known, answers(features), labels, {"far": answers(np.zeros((5, SIZE), np.float32))})
    assert all(candidate.near == {} for candidate in found)


def test_k_is_at_most_half_of_the_images_that_a_class_has(known):
    features, labels = draw(100, 0.5, seed=5)
    found = compare_methods(known, answers(features), labels, {"far": answers(features)})
    assert {candidate.neighbours for candidate in found if candidate.method == "knn"} == {1, 10}  # 25 of each class


def test_without_an_index_there_is_no_knn(known):
    empty = Known(known.features, known.labels, known.index[:0], known.index_labels[:0], *HEAD)
    features, labels = draw(100, 0.5, seed=5)
    found = compare_methods(empty, answers(features), labels, {"far": answers(features)})
    assert "knn" not in {candidate.method for candidate in found}


def test_two_classes_and_identical_images_give_finite_scores():
    features = np.ones((12, 3), np.float32)
    labels = np.arange(12) % 2
    head = np.ones((2, 3), np.float32), np.zeros(2, np.float32)
    known = Known(features, labels, unit_vectors(features), np.sort(labels).astype(np.int32), *head)
    store, same = fit_methods(known), Answers(np.full((4, 2), 0.5, np.float32), features[:4])
    assert all(np.isfinite(score(method, 1, store, same)).all() for method in METHODS)


def test_nearest_neighbour_accuracy_is_the_share_whose_nearest_image_is_of_their_class():
    index, labels = np.eye(2, dtype=np.float32), np.array([0, 1])
    images = np.array([[3, 1], [1, 3], [5, 0]], np.float32)
    assert nearest_neighbour_accuracy(index, labels, images, np.array([0, 1, 1])) == pytest.approx(2 / 3)
