"""Calibration of a network's confidence, and the temperature that corrects it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from handlers.engines import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

CALIBRATION_BINS = 15  # Source: Guo et al. 2017, section 2, https://arxiv.org/abs/1706.04599


class Reliability(NamedTuple):
    """By equal-width bins of the top class's confidence: its sum, the number of right answers, of images."""

    confident: NDArray[np.float64]
    correct: NDArray[np.float64]
    images: NDArray[np.intp]


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature that gives the logits (N, K) the smallest negative log-likelihood on the labels (N,).

    It is 1 where every answer is right: then no confidence is too high for them, and too little is known.
    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    if (logits.argmax(axis=1) == labels).all():
        logger.warning("all %d held-out images are answered right: the confidences stay uncalibrated", len(labels))
        return 1.0

    def loss(log_temperature: float) -> float:
        chosen = softmax(logits, float(np.exp(log_temperature)))[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    return round(float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)), 4)


def reliability(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Reliability:
    """Return the accuracy of the top class of `probabilities` (N, K) by its confidence, for true `labels` (N,)."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return Reliability(
        confident=np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS).astype(np.float64),
        correct=np.bincount(bins, weights=right, minlength=CALIBRATION_BINS).astype(np.float64),
        images=np.bincount(bins, minlength=CALIBRATION_BINS),
    )


def expected_calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean gap between confidence and accuracy of the top class over 15 equal-width bins, weighted by their size.

    `Σ_b |B_b|/N · |accuracy(B_b) - confidence(B_b)|`. Source: Guo et al. 2017, equation 3,
    https://arxiv.org/abs/1706.04599
    """
    bins = reliability(probabilities, labels)
    return float(np.abs(bins.correct - bins.confident).sum() / len(labels))
