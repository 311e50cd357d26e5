"""Measure the archive's evidence on labelled images: coverage of answer sets, shares of familiar images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.evidence.answer_set import AnswerSets, is_member
from handlers.evidence.familiar import Familiarity
from handlers.evidence.store import EVIDENCE, read_store

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from contracts.model import Contract

COVERAGES = (0.8, 0.9, 0.95, 0.99)


class MeasuredEvidence:
    """The evidence of a version's folder; parts that it lacks are left out of what is measured."""

    def __init__(self, folder: Path, contract: Contract) -> None:
        """Read the folder's `evidence.safetensors` if the contract has evidence."""
        settings = contract.evidence
        store = read_store(folder) if settings is not None and (folder / EVIDENCE).is_file() else {}
        self._familiar = Familiarity(store, settings.familiar) if store and settings and settings.familiar else None
        self._sets = AnswerSets(store) if store and settings and settings.answer_set else None

    def familiar(
        self, probabilities: NDArray[np.float32], features: NDArray[np.float32] | None
    ) -> NDArray[np.bool_] | None:
        """Return (N,) True for familiar images, from probabilities (N, K) and features (N, D); None if unknown."""
        if self._familiar is None or features is None:
            return None
        return self._familiar.is_familiar(self._familiar.score(probabilities, features))

    def measure_sets(self, probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> list[dict[str, float]]:
        """Return for each of `COVERAGES` the share of answer sets with the right class, and their mean size.

        `coverage` and `empty` are those of the conformal rule alone, whose sets may be empty; `served_coverage` and
        `mean_size` those of the sets as served, which hold the likeliest class at least.
        """
        return [] if self._sets is None else [self._measure(probabilities, labels, asked) for asked in COVERAGES]

    def _measure(self, probabilities: NDArray[np.float32], labels: NDArray[np.int64], asked: float) -> dict[str, float]:
        if self._sets is None:
            raise ValueError("this version has no answer sets")
        images = np.arange(len(labels))
        within = is_member(probabilities, self._sets.threshold(asked))
        served = within.copy()
        served[images, probabilities.argmax(axis=1)] = True
        return {
            "asked": asked,
            "coverage": round(float(within[images, labels].mean()), 4),
            "empty": round(float((~within.any(axis=1)).mean()), 4),
            "served_coverage": round(float(served[images, labels].mean()), 4),
            "mean_size": round(float(served.sum(axis=1).mean()), 4),
        }


def measure_familiar(familiar: NDArray[np.bool_], right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the share of `familiar` images (N,) and the accuracy on them and on the others, given who is `right`."""

    def accuracy(chosen: NDArray[np.bool_]) -> float | None:
        return round(float(right[chosen].mean()), 4) if chosen.any() else None

    return {
        "familiar": round(float(familiar.mean()), 4),
        "accuracy_of_familiar": accuracy(familiar),
        "accuracy_of_unfamiliar": accuracy(~familiar),
    }
