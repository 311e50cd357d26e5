"""Compare the methods of familiarity on held-out images and choose one; no reported test image is looked at.

Each candidate is judged by how well its score tells held-out images from
- unfamiliar images made of held-out ones or of nothing (training/evaluate/unfamiliar.py);
- the images of a class, after that class is removed from the logits and from all that the method knows of the training
  images (`class left out`). The network learnt the class all the same: its features keep apart from the others, and
  every method finds this easier than a class which the network never saw;
- held-out images that it answers wrongly, which stand near the border of two classes (`answered wrongly`). They are
  images of known classes; an image of an unknown class often lands on the same borders, and they rank the methods.
The candidate with the largest mean of the first and of the other two wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import rankdata

from handlers.evidence.familiar import familiarity_scores
from handlers.evidence.store import unit_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from handlers.evidence.store import Store

NEIGHBOURS = (1, 10, 50)
"""Candidates for k, as far as the index has twice as many images of each class."""

LEFT_OUT_CLASSES, LEFT_OUT_IMAGES = 5, 1000
"""Classes that are left out in turn, and held-out images that are compared without them."""

FEWEST = 10
"""Images on either side of a comparison; an area from fewer says nothing."""

SHRINKAGE = 1e-4
"""Share of the mean variance that is added to the covariance, so that it can be inverted."""

FAR, NEAR = "far", "near"
LEFT_OUT, WRONG = "class left out", "answered wrongly"


class Answers(NamedTuple):
    """The engine's probabilities (N, K) and pooled features (N, D) of N images."""

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class Known:
    """Training images as the methods may know them: pooled `features` (N, D) with their `labels` (N,).

    `index` (M, D) are the unit vectors of the coreset with its `index_labels` (M,); `weight` (K, D) and `bias` (K,) are
    those of the network's linear head.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    index: NDArray[np.float32]
    index_labels: NDArray[np.int32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def without(self, label: int) -> Known:
        """Return the same without a class."""
        kept, in_index = self.labels != label, self.index_labels != label
        return Known(
            self.features[kept],
            self.labels[kept],
            self.index[in_index],
            self.index_labels[in_index],
            np.delete(self.weight, label, axis=0),
            np.delete(self.bias, label),
        )


@dataclass(frozen=True)
class Candidate:
    """A method with its k and the area under the ROC curve for each kind of unfamiliar image."""

    method: str
    neighbours: int
    far: dict[str, float]
    near: dict[str, float]

    @property
    def score(self) -> float:
        """Return the mean of the mean areas for far and for near images."""
        means = [float(np.mean(list(areas.values()))) for areas in (self.far, self.near) if areas]
        return round(float(np.mean(means)), 4)


def auroc(familiar: NDArray[np.floating], unfamiliar: NDArray[np.floating]) -> float:
    """Return the chance that a familiar image scores higher than an unfamiliar one; ties count half.

    Source: Fawcett 2006, section 7, https://doi.org/10.1016/j.patrec.2005.10.010
    """
    ranks = rankdata(np.concatenate([familiar, unfamiliar]))[: len(familiar)]
    below = ranks.sum() - len(familiar) * (len(familiar) + 1) / 2
    return float(below / (len(familiar) * len(unfamiliar)))


def fpr_at_95(familiar: NDArray[np.floating], unfamiliar: NDArray[np.floating]) -> float:
    """Return the share of unfamiliar images that score as high as 95 % of the familiar ones do."""
    return float((unfamiliar >= np.quantile(familiar, 0.05, method="lower")).mean())


def compare_methods(
    known: Known, held_out: Answers, labels: NDArray[np.int64], far: dict[str, Answers]
) -> list[Candidate]:
    """Return all candidates with their areas, the best one first.

    Args:
        known: what the methods know of the training images.
        held_out: answers of the engine to held-out images.
        labels: (N,), their right classes.
        far: its answers to unfamiliar images, by kind.
    """
    fitted = fit_methods(known)
    is_right = held_out.probabilities.argmax(axis=1) == labels
    left_out = _leave_classes_out(known, held_out, labels)
    candidates = []
    for method, neighbours in _methods(known):
        scores = score(method, neighbours, fitted, held_out)
        areas = {kind: auroc(scores, score(method, neighbours, fitted, answers)) for kind, answers in far.items()}
        near = {}
        if areas_left_out := [
            auroc(without[~is_left_out], without[is_left_out])
            for store, answers, is_left_out in left_out
            for without in [score(method, neighbours, store, answers)]
        ]:
            near[LEFT_OUT] = float(np.mean(areas_left_out))
        if min(is_right.sum(), (~is_right).sum()) >= FEWEST:
            near[WRONG] = auroc(scores[is_right], scores[~is_right])
        candidates.append(Candidate(method, neighbours, _rounded(areas), _rounded(near)))
    return sorted(candidates, key=lambda candidate: -candidate.score)


def fit_methods(known: Known) -> Store:
    """Return the tensors of all methods (handlers/evidence/familiar.py), in float32."""
    whitening, means = _fit_mahalanobis(known.features, known.labels)
    origin, principal, scale = _fit_vim(known)
    return {
        "features": known.index,
        "head_weight": known.weight,
        "head_bias": known.bias,
        "whitening": whitening,
        "whitened_means": means,
        "vim_origin": origin,
        "vim_principal": principal,
        "vim_scale": scale,
    }


def score(method: str, neighbours: int, store: Store, answers: Answers) -> NDArray[np.float32]:
    """Return the scores (N,) of images by a method, in parts that need little memory."""
    return np.concatenate(
        [
            familiarity_scores(method, store, neighbours, *(array[start : start + 1000] for array in answers))
            for start in range(0, len(answers.features), 1000)
        ]
    )


def _methods(known: Known) -> list[tuple[str, int]]:
    """Return the candidates, the cheapest first: of equals it wins."""
    neighbours: list[int] = []
    if len(known.index):
        fewest = int(np.unique(known.index_labels, return_counts=True)[1].min())
        neighbours = [k for k in NEIGHBOURS if k == 1 or 2 * k <= fewest]
    return [("max_probability", 0), ("energy", 0), *(("knn", k) for k in neighbours), ("mahalanobis", 0), ("vim", 0)]


def _leave_classes_out(
    known: Known, held_out: Answers, labels: NDArray[np.int64]
) -> list[tuple[Store, Answers, NDArray[np.bool_]]]:
    """Return for some classes the methods' tensors and the answers without it, and which images are of it."""
    classes = len(known.bias)
    chosen = np.linspace(0, len(labels) - 1, min(len(labels), LEFT_OUT_IMAGES)).astype(int)
    probabilities, features, labels = held_out.probabilities[chosen], held_out.features[chosen], labels[chosen]
    found = []
    for label in np.linspace(0, classes - 1, min(classes, LEFT_OUT_CLASSES)).astype(int):
        is_left_out = labels == label
        if classes < 3 or min(is_left_out.sum(), (~is_left_out).sum()) < FEWEST:
            continue
        others = np.delete(probabilities, label, axis=1)
        others /= np.maximum(others.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        found.append((fit_methods(known.without(label)), Answers(others, features), is_left_out))
    return found


def _fit_mahalanobis(
    features: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return `whitening` (D, D) and `whitened_means` (K, D)."""
    classes, positions = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == label].mean(axis=0, dtype=np.float64) for label in classes])
    centred = features - means[positions].astype(np.float32)
    covariance = (centred.T @ centred).astype(np.float64) / len(features)
    variance = float(np.trace(covariance)) / len(covariance) or 1.0
    covariance += SHRINKAGE * variance * np.eye(len(covariance))
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return whitening.astype(np.float32), (means @ whitening).astype(np.float32)


def _fit_vim(known: Known) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return `vim_origin` (D,), `vim_principal` (D, D/2) and `vim_scale` (1,)."""
    origin = (-np.linalg.pinv(known.weight.astype(np.float64)) @ known.bias).astype(np.float32)
    centred = known.features - origin
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    principal = vectors[:, ::-1][:, : len(vectors) // 2].astype(np.float32)
    inside = centred @ principal
    outside = np.sqrt(np.maximum((centred**2).sum(axis=1) - (inside**2).sum(axis=1), 0))
    largest = (known.features @ known.weight.T + known.bias).max(axis=1)
    scale = largest.mean() / max(float(outside.mean()), 1e-6)
    return origin, principal, np.array([scale], np.float32)


def nearest_neighbour_accuracy(
    index: NDArray[np.float32],
    index_labels: NDArray[np.integer],
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> float:
    """Return the share of images, by pooled features (N, D), whose nearest one in `index` (M, D) is of their class."""
    queries = unit_vectors(features)
    nearest = [(queries[start : start + 500] @ index.T).argmax(axis=1) for start in range(0, len(queries), 500)]
    return float((index_labels[np.concatenate(nearest)] == labels).mean())


def _rounded(areas: dict[str, float]) -> dict[str, float]:
    return {kind: round(area, 4) for kind, area in areas.items()}
