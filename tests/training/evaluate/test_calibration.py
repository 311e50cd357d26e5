import numpy as np
import pytest

from handlers.engines import softmax
from training.evaluate.calibration import CALIBRATION_BINS, expected_calibration_error, fit_temperature, reliability


def one_hot(answers: list[int], confidence: float = 1.0, classes: int = 3) -> np.ndarray:
    rest = (1 - confidence) / (classes - 1)
    probabilities = np.full((len(answers), classes), rest, np.float32)
    probabilities[np.arange(len(answers)), answers] = confidence
    return probabilities


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    labels = np.array([0, 0, 0, 1])
    assert expected_calibration_error(one_hot([0, 0, 0, 0], confidence=0.9), labels) == pytest.approx(0.15, abs=1e-6)
    assert expected_calibration_error(one_hot([0, 0, 0, 1]), labels) == 0


def test_calibration_error_weighs_bins_by_their_images():
    """One of 10 images is answered with 1.0 and wrongly, the rest with 1.0 and rightly."""
    assert expected_calibration_error(one_hot([0] * 10), np.array([1] + [0] * 9)) == pytest.approx(0.1)


def test_images_that_are_all_right_say_nothing_about_confidence(caplog):
    logits = np.tile(np.float32([[2.0, 0.0], [0.0, 2.0]]), (20, 1))
    assert fit_temperature(logits, np.tile([0, 1], 20)) == 1.0
    assert "uncalibrated" in caplog.text


def test_fitted_temperature_undoes_overconfidence():
    random = np.random.default_rng(0)
    logits = random.normal(size=(5000, 5)).astype(np.float32)
    drawn = np.array(
        [random.choice(5, p=row.astype(np.float64) / row.sum(dtype=np.float64)) for row in softmax(logits, 1.0)]
    )
    assert fit_temperature(logits * 3, drawn) == pytest.approx(3, rel=0.1)


def test_reliability_counts_images_and_right_answers_by_the_bin_of_their_confidence():
    probabilities = np.array([[0.95, 0.05], [0.06, 0.94], [0.55, 0.45], [0, 1]], np.float32)
    bins = reliability(probabilities, np.array([0, 0, 0, 1]))
    assert len(bins.images) == CALIBRATION_BINS
    assert bins.images[[8, 14]].tolist() == [1, 3]
    assert bins.correct[[8, 14]].tolist() == [1, 2]
    assert bins.confident[[8, 14]] == pytest.approx([0.55, 0.95 + 0.94 + 1])
    assert bins.images.sum() == 4, "a confidence of 1 is in the last bin"
