"""How far a network's confidence can be believed, and the one number that corrects it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from handlers.engines import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature that gives the logits (N, K) the smallest negative log-likelihood on the labels (N,).

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """

    def loss(log_temperature: float) -> float:
        chosen = softmax(logits, float(np.exp(log_temperature)))[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    return round(float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)), 4)
