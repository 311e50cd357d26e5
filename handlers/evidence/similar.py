"""Find the training images that are most similar to an image: the nearest by the angle of their pooled features."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from handlers.evidence.store import unit_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from handlers.evidence.store import Store


class Neighbour(NamedTuple):
    """A training image of the index: its number there, its class's index and its cosine similarity, -1 to 1."""

    id: int
    label: int
    similarity: float


class Neighbours:
    """The index of training images, by class."""

    def __init__(self, store: Store) -> None:
        """Keep the store's `features` and `labels`, which are sorted by label."""
        self._features: NDArray[np.float32] = store["features"]
        self._labels: NDArray[np.int32] = store["labels"]

    def nearest(self, features: NDArray[np.float32], classes: NDArray[np.intp], k: int) -> list[list[Neighbour]]:
        """Return for each image its `k` nearest training images of each of its classes, by falling similarity.

        Args:
            features: (N, D) pooled features as the engine gives them.
            classes: (N, C) different class indices for each image, such as those of the answer and the runner-up.
            k: how many of each class; fewer where the index has fewer.
        """
        return [
            sorted(
                (neighbour for label in labels for neighbour in self._of_class(image, int(label), k)),
                key=lambda neighbour: -neighbour.similarity,
            )
            for image, labels in zip(unit_vectors(features), classes, strict=True)
        ]

    def _of_class(self, image: NDArray[np.float32], label: int, k: int) -> list[Neighbour]:
        start, end = np.searchsorted(self._labels, (label, label + 1))
        similarities = self._features[start:end] @ image
        nearest = np.argsort(-similarities, kind="stable")[:k]
        return [Neighbour(int(start + place), label, float(similarities[place])) for place in nearest]


def thumbnail(store: Store, number: int) -> bytes | None:
    """Return the index's image `number` as a PNG file; None if there is no such image or no thumbnails."""
    ends = store.get("thumbnail_ends")
    if ends is None or not 0 <= number < len(ends):
        return None
    start = int(ends[number - 1]) if number else 0
    file = io.BytesIO()
    with Image.open(io.BytesIO(store["thumbnails"][start : int(ends[number])].tobytes())) as image:
        image.save(file, "PNG")
    return file.getvalue()
