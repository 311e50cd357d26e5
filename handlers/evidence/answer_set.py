"""Give the smallest sets of classes that hold the right one with the asked coverage (split conformal prediction).

A class is in an image's set if its conformal score, 1 - probability, is at most the threshold: the ⌈(n + 1) ·
coverage⌉-th smallest score that the right class had on the n held-out images. Of images drawn like these, at least the
asked share then has its right class in its set, whatever the network. Source: Angelopoulos & Bates 2021, section 1,
https://arxiv.org/abs/2107.07511; least expected size: Sadinle et al. 2019, https://arxiv.org/abs/1609.00451
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from handlers.evidence.store import Store


class AnswerSets:
    """Answer sets by the conformal scores of held-out images."""

    def __init__(self, store: Store) -> None:
        """Keep the store's `answer_set_scores`, which are sorted."""
        self._scores: NDArray[np.float32] = store["answer_set_scores"]

    def members(self, probabilities: NDArray[np.float32], coverage: float) -> list[list[int]]:
        """Return for each image the class indices of its answer set, the likeliest first.

        No set is empty: where no class is likely enough, it holds the likeliest. So the right class is in at least the
        asked share of the sets, and never in fewer than the network answers right.

        Args:
            probabilities: (N, K) of the engine that the scores are from.
            coverage: share of the sets that shall hold the right class, between 0 and 1.
        """
        within = is_member(probabilities, self.threshold(coverage))
        within[np.arange(len(within)), probabilities.argmax(axis=1)] = True
        order = np.argsort(-probabilities, axis=1, kind="stable")
        return [[int(label) for label in labels if inside[label]] for labels, inside in zip(order, within, strict=True)]

    def threshold(self, coverage: float) -> float:
        """Return the largest score of a member; infinite where too few images were held out for this coverage."""
        count = len(self._scores)
        # Rounded: (n + 1) · coverage is meant in decimals, and 20 · 0.95 = 19 must not become 20.
        rank = math.ceil(round((count + 1) * coverage, 9))
        return float(self._scores[max(rank, 1) - 1]) if rank <= count else math.inf


def conformal_scores(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the score of each class, 1 - `probabilities` (N, K)."""
    scores: NDArray[np.float32] = np.float32(1) - probabilities
    return scores


def is_member(probabilities: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Return (N, K) True for the classes whose score is at most `threshold`."""
    return np.asarray(conformal_scores(probabilities) <= threshold)
