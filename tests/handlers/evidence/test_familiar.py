from __future__ import annotations

import numpy as np
import pytest

from contracts.evidence import FAMILIARITY_METHODS, Familiar
from handlers.evidence.familiar import METHODS, Familiarity, familiarity_scores

SURE, UNSURE = [0.9, 0.1], [0.6, 0.4]


def scores(method, store, features, probabilities=(SURE, UNSURE), neighbours=0):
    return familiarity_scores(
        method, store, neighbours, np.array(probabilities, np.float32), np.array(features, np.float32)
    )


def test_every_method_that_a_contract_can_name_is_there():
    assert set(METHODS) == set(FAMILIARITY_METHODS)


def test_familiarity_is_the_share_of_held_out_images_that_score_below():
    settings = Familiar("max_probability", neighbours=0, images=20)
    familiarity = Familiarity({"familiarity_scores": np.linspace(0.05, 1, 20, dtype=np.float32)}, settings)
    probabilities = np.array([[0.01, 0.04], [0.04, 0.06], [0.51, 0.49], [0.99999, 0]], np.float32)
    found = familiarity.score(probabilities, np.zeros((4, 2), np.float32))
    assert found.tolist() == [0, 0.05, 0.5, 0.95]
    assert familiarity.is_familiar(found).tolist() == [False, True, True, True]


def test_knn_is_the_similarity_to_the_kth_nearest_training_image():
    store = {"features": np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)}
    assert scores("knn", store, [[7, 0], [0, 3]], neighbours=2).tolist() == pytest.approx([0.8, 0.6])


def test_knn_with_fewer_training_images_than_neighbours_takes_the_farthest():
    store = {"features": np.array([[1, 0], [0, 1]], np.float32)}
    assert scores("knn", store, [[2, 0]], [SURE], neighbours=9).tolist() == [0]


def test_max_probability_is_the_confidence():
    assert scores("max_probability", {}, [[0], [0]]).tolist() == pytest.approx([0.9, 0.6])


def test_energy_is_the_log_of_the_summed_exponentials_and_does_not_overflow():
    store = {"head_weight": np.array([[1, 0], [0, 1]], np.float32), "head_bias": np.array([0, 1], np.float32)}
    expected = [np.log(np.exp(2) + np.exp(4)), 1000]
    assert scores("energy", store, [[2, 3], [1000, 5]]).tolist() == pytest.approx(expected, rel=1e-6)


def test_mahalanobis_is_the_distance_to_the_nearest_class_in_its_covariance():
    covariance = np.array([[4, 1], [1, 2]])
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    means = np.array([[0, 0], [10, 10]])
    store = {
        "whitening": whitening.astype(np.float32),
        "whitened_means": (means @ whitening).astype(np.float32),
    }
    images = np.array([[1, -2], [9, 12]])
    expected = [
        -(difference @ np.linalg.inv(covariance) @ difference) for difference in (images[0], images[1] - means[1])
    ]
    assert scores("mahalanobis", store, images).tolist() == pytest.approx(expected, rel=1e-4)


def test_vim_is_the_energy_less_the_length_outside_the_principal_subspace():
    store = {
        "head_weight": np.array([[1, 0, 0], [0, 1, 0]], np.float32),
        "head_bias": np.array([0, 0], np.float32),
        "vim_origin": np.array([0, 0, 1], np.float32),
        "vim_principal": np.array([[1], [0], [0]], np.float32),
        "vim_scale": np.array([0.5], np.float32),
    }
    inside, outside = scores("vim", store, [[2, 0, 1], [2, 3, 5]])
    assert inside == pytest.approx(np.log(np.exp(2) + 1))
    assert outside == pytest.approx(np.log(np.exp(2) + np.exp(3)) - 0.5 * np.hypot(3, 4))
