"""Measure how familiar an image is: how closely its features or answer resemble those of the training data.

Each method gives a score, higher for a more familiar image. The familiarity of an image is the share of the held-out
images that score below it, so it means the same whatever the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from handlers.evidence.store import unit_vectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from contracts.evidence import Familiar
    from handlers.evidence.store import Store

    Scores: TypeAlias = NDArray[np.float32]
    Method: TypeAlias = Callable[[Store, int, NDArray[np.float32], NDArray[np.float32]], Scores]


class Familiarity:
    """Familiarity by the contract's method."""

    def __init__(self, store: Store, settings: Familiar) -> None:
        """Keep the store's tensors and its sorted `familiarity_scores`."""
        self._store = store
        self._settings = settings
        self._held_out: Scores = store["familiarity_scores"]

    def score(self, probabilities: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the familiarity (N,), from 0 to 1, of images with these probabilities (N, K) and features (N, D)."""
        scores = familiarity_scores(
            self._settings.method, self._store, self._settings.neighbours, probabilities, features
        )
        shares: NDArray[np.float64] = np.searchsorted(self._held_out, scores, side="left") / len(self._held_out)
        return shares

    def is_familiar(self, familiarity: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return (N,) True for the images that are as familiar as `familiar_share` of the held-out images are."""
        # Rounded: one of 20 images is a share of 0.05, which is below 1 - 0.95 in floating point.
        return np.asarray(familiarity >= round(1 - self._settings.familiar_share, 9))


def familiarity_scores(
    method: str, store: Store, neighbours: int, probabilities: NDArray[np.float32], features: NDArray[np.float32]
) -> Scores:
    """Return the scores (N,) that `method`, one of `METHODS`, gives images, higher for a more familiar one.

    Args:
        method: its name.
        store: holds the method's tensors.
        neighbours: k of `knn`.
        probabilities: (N, K) of the engine, temperature included.
        features: (N, D) pooled features as the engine gives them.
    """
    return METHODS[method](store, neighbours, probabilities, features)


def _knn(store: Store, neighbours: int, _: NDArray[np.float32], features: NDArray[np.float32]) -> Scores:
    """Return the cosine similarity to the k-th nearest training image of the index.

    Among unit vectors the nearest by angle are the nearest by distance. Source: Sun et al. 2022, equation 1,
    https://arxiv.org/abs/2204.06507
    """
    similarities = unit_vectors(features) @ store["features"].T
    place = similarities.shape[1] - min(neighbours, similarities.shape[1])
    scores: Scores = np.partition(similarities, place, axis=1)[:, place]
    return scores


def _max_probability(_: Store, __: int, probabilities: NDArray[np.float32], ___: NDArray[np.float32]) -> Scores:
    """Return the confidence. Source: Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136."""
    scores: Scores = probabilities.max(axis=1)
    return scores


def _energy(store: Store, _: int, __: NDArray[np.float32], features: NDArray[np.float32]) -> Scores:
    """Return the negative free energy at temperature 1, `log Σ_k exp(logit_k)`.

    Source: Liu et al. 2020, equation 4, https://arxiv.org/abs/2010.03759
    """
    logits = features @ store["head_weight"].T + store["head_bias"]
    largest = logits.max(axis=1)
    scores: Scores = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return scores


def _mahalanobis(store: Store, _: int, __: NDArray[np.float32], features: NDArray[np.float32]) -> Scores:
    """Return minus the squared Mahalanobis distance to the nearest class's mean, with one covariance for all classes.

    `whitening` (D, D) makes that covariance the identity, `whitened_means` (K, D) are the classes' means after it.
    Source: Lee et al. 2018, equation 2, https://arxiv.org/abs/1807.03888
    """
    images, means = features @ store["whitening"], store["whitened_means"]
    distances = (images**2).sum(axis=1)[:, None] - 2 * images @ means.T + (means**2).sum(axis=1)
    scores: Scores = -distances.min(axis=1)
    return scores


def _vim(store: Store, _: int, __: NDArray[np.float32], features: NDArray[np.float32]) -> Scores:
    """Return the energy less the scaled length of the features outside the training images' principal subspace.

    `vim_origin` (D,) is where all logits are equal to zero, `vim_principal` (D, P) the subspace's orthonormal basis,
    `vim_scale` (1,) makes both parts equal on average. Source: Wang et al. 2022, equation 7,
    https://arxiv.org/abs/2203.10807
    """
    centred = features - store["vim_origin"]
    inside = centred @ store["vim_principal"]
    outside = np.sqrt(np.maximum((centred**2).sum(axis=1) - (inside**2).sum(axis=1), 0))
    scores: Scores = _energy(store, 0, features, features) - store["vim_scale"][0] * outside
    return scores


METHODS: dict[str, Method] = {
    "knn": _knn,
    "max_probability": _max_probability,
    "energy": _energy,
    "mahalanobis": _mahalanobis,
    "vim": _vim,
}
"""By the contract's names; functions take store, k, probabilities (N, K) and features (N, D)."""

TENSORS = {
    "knn": ("features",),
    "max_probability": (),
    "energy": ("head_weight", "head_bias"),
    "mahalanobis": ("whitening", "whitened_means"),
    "vim": ("head_weight", "head_bias", "vim_origin", "vim_principal", "vim_scale"),
}
"""The store's tensors that each method needs."""
