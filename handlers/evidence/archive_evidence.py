"""The evidence that an archive can give about images, beside the heatmap.

What it cannot give is said to be unavailable, with the reason: an archive of before schema 3 has no evidence at all,
and of a small data set some parts cannot be made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts import wire
from contracts.evidence import Evidence
from handlers.errors import UnknownExample
from handlers.evidence.answer_set import AnswerSets
from handlers.evidence.familiar import Familiarity
from handlers.evidence.similar import Neighbours, thumbnail
from handlers.evidence.store import read_store

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from contracts.model import Contract
    from handlers.engines.base import Outputs
    from handlers.evidence.store import Store

NOT_PACKED = "this version was packed without evidence: pack it again with gradserve package"
NO_FEATURES = "the engine of this version gives no features: pack it again with gradserve package"


class ArchiveEvidence:
    """Familiarity, similar images and answer sets by the contract's settings and the archive's store."""

    def __init__(self, contract: Contract, store: Store | None) -> None:
        """Prepare the parts that `contract.evidence` has."""
        settings = contract.evidence or Evidence()
        store = store or {}
        self._classes = contract.classes
        self._store = store
        self._reasons = dict(settings.absent)
        self._familiar = Familiarity(store, settings.familiar) if settings.familiar else None
        self._similar = Neighbours(store) if settings.similar else None
        self._sets = AnswerSets(store) if settings.answer_set else None

    def familiarity(self, outputs: Outputs) -> NDArray[np.float64] | None:
        """Return how familiar each image is, (N,) from 0 to 1; None if the archive cannot tell."""
        if self._familiar is None or outputs.features is None:
            return None
        return self._familiar.score(outputs.probabilities, outputs.features)

    def is_familiar(self, familiarity: float) -> bool:
        """Return True if an image of this familiarity counts as familiar."""
        return self._familiar is not None and bool(self._familiar.is_familiar(np.array([familiarity]))[0])

    def why_absent(self, part: str) -> wire.Entry:
        """Return what stands in the place of `part` (`familiar`, `similar` or `answer_set`), which is not available."""
        return wire.unavailable(self._reasons.get(part, NOT_PACKED if not self._store else NO_FEATURES))

    def similar(self, outputs: Outputs, row: int, count: int) -> list[wire.Entry] | wire.Entry:
        """Return the `count` nearest training images of the answer's class and of the runner-up's, nearest first."""
        if self._similar is None or outputs.features is None:
            return self.why_absent("similar")
        best = np.argsort(-outputs.probabilities[row : row + 1], axis=1, kind="stable")[:, :2]
        (found,) = self._similar.nearest(outputs.features[row : row + 1], best, count)
        return [
            {"id": other.id, "class": self._classes[other.label], "similarity": round(other.similarity, 4)}
            for other in found
        ]

    def answer_set(self, probabilities: NDArray[np.float32], coverage: float) -> list[wire.Entry] | wire.Entry:
        """Return the classes that hold the right one in a share `coverage` of the images, likeliest first.

        `probabilities` (K,) are those of one image.
        """
        if self._sets is None:
            return self.why_absent("answer_set")
        (members,) = self._sets.members(probabilities[None], coverage)
        return [
            {"class": self._classes[index], "confidence": round(float(probabilities[index]), 6)} for index in members
        ]

    def example(self, number: int) -> bytes:
        """Return the thumbnail of the index's training image `number`, a PNG file.

        Raises:
            UnknownExample: the archive does not hold it.
        """
        found = thumbnail(self._store, number)
        if found is None:
            raise UnknownExample(number, len(self._store.get("thumbnail_ends", ())))
        return found


def load_evidence(directory: Path, contract: Contract) -> ArchiveEvidence:
    """Return the evidence of an unpacked archive.

    Raises:
        BrokenArchive: the contract promises evidence that the archive does not hold.
    """
    return ArchiveEvidence(contract, None if contract.evidence is None else read_store(directory))
