"""Insertion and deletion: the pixels of a heatmap must decide the answer.

Deletion greys an image's pixels from the hottest to the coldest; insertion brings them back, in the same order, into
the blurred image. Where the hot pixels decide, confidence in the explained class falls fast and rises fast: the area
under the first curve is small, that under the second large. What a heatmap must beat is pixels in random order, and the
heatmap of another image: random pixels spoil an image like noise, so deletion alone says little against them.
Source: Petsiuk et al. 2018, section 4.3, https://arxiv.org/abs/1806.07421

Both curves are about the likeliest class only. A heatmap that is the same for every class can win them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import gaussian_filter

from handlers.engines import predict_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from handlers.engines import Engine

STEPS = 8
"""Pixels go in so many equal parts, each of which costs two forwards an image."""

BLUR = 1 / 8
"""The blur's standard deviation as a share of the image's side; the network then knows next to nothing."""


@dataclass(frozen=True)
class Faithfulness:
    """The mean confidence in the explained class as pixels go (`deletion`) and come back (`insertion`), in equal steps.

    The areas lie under the curves, over the share of the pixels from 0 to 1; `score` is insertion's less deletion's.
    """

    score: float
    deletion_area: float
    insertion_area: float
    deletion: list[float]
    insertion: list[float]


class Probe:
    """Images, an engine's answers to them, and its answers to what is left of them; the answers are what to explain.

    Attributes:
        images: (N, 3, H, W) float32, normalised.
        targets: (N,) the classes that the engine answered.
        runners_up: (N,) the classes that it found second likeliest.
    """

    def __init__(self, engine: Engine, images: NDArray[np.float32]) -> None:
        self.images = images
        self._engine = engine
        whole = predict_all(engine, images)
        self.targets, self.runners_up = first_two(whole)
        sigma = BLUR * images.shape[-1]
        self._blurred = gaussian_filter(images, (0, 0, sigma, sigma))
        grey = predict_all(engine, np.zeros_like(images[:1]))  # the training data's mean colour
        self._whole = self._confidence(whole)
        self._grey = self._confidence(grey.repeat(len(images), axis=0))
        self._unsharp = self._confidence(predict_all(engine, self._blurred))

    def measure(self, heatmaps: NDArray[np.float32]) -> Faithfulness:
        """Return the faithfulness of `heatmaps` (N, H, W); pixels of equal heat go in random order."""
        places = ranks(heatmaps)[:, None]
        deletion, insertion = [self._whole], [self._unsharp]
        for step in range(1, STEPS):
            hot = places < step / STEPS * heatmaps[0].size
            greyed, restored = np.where(hot, np.float32(0), self.images), np.where(hot, self.images, self._blurred)
            deletion.append(self._confidence(predict_all(self._engine, greyed)))
            insertion.append(self._confidence(predict_all(self._engine, restored)))
        deletion.append(self._grey)
        insertion.append(self._whole)
        out, back = (float(np.trapezoid(curve, dx=1 / STEPS)) for curve in (deletion, insertion))
        return Faithfulness(back - out, out, back, deletion, insertion)

    def measure_random(self) -> Faithfulness:
        """Return the faithfulness of pixels in random order."""
        return self.measure(np.zeros_like(self.images[:, 0]))

    def _confidence(self, probabilities: NDArray[np.float32]) -> float:
        return float(probabilities[np.arange(len(self.targets)), self.targets].mean(dtype=np.float64))


def ranks(heatmaps: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return each pixel's rank in its heatmap (N, H, W), 0 for the hottest; pixels of equal heat in random order."""
    heat = heatmaps.reshape(len(heatmaps), -1)
    order = np.lexsort((np.random.default_rng(0).random(heat.shape), -heat))
    return np.argsort(order).reshape(heatmaps.shape)


def first_two(scores: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the likeliest and the second likeliest class, (N,) each, by `scores` (N, K)."""
    ranked = np.argsort(-scores, axis=1)
    return ranked[:, 0], ranked[:, 1]
