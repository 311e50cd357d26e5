"""Test a heatmap on its own image: keep only its hottest quarter, then blur that quarter away, and ask again.

A heatmap claims that its hot region is why the network sees the class. If so, the region alone keeps the class's
confidence, and the image without it loses it. What goes is blurred, not blackened: a black shape is itself something to
see. Source: Fong & Vedaldi 2017, section 4.1, https://arxiv.org/abs/1704.03296
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from handlers.engines.base import predict_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from handlers.engines.base import Engine

HOT_SHARE = 0.25
"""The share of an image's pixels that count as the hot region."""

BLUR = 1 / 8
"""The blur's standard deviation as a share of the image's side; the network then knows next to nothing."""

SEEN = 0.1
"""The confidence in a class below which its heatmap cannot be tested: there is too little to lose."""


def keep_and_remove(
    engine: Engine, images: NDArray[np.float32], heat: NDArray[np.float32], targets: NDArray[np.intp]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the confidence in each image's target with only the hot region kept, and with it removed, (N,) each.

    Args:
        engine: the one that answered.
        images: (N, 3, H, W), normalised.
        heat: (N, H, W), the heatmaps; pixels of equal heat count from the top left.
        targets: (N,) class indices.
    """
    blurred = blur(images)
    hot = hottest(heat)[:, None]
    tried = np.concatenate([np.where(hot, images, blurred), np.where(hot, blurred, images)])
    confidence = predict_all(engine, tried)[np.arange(len(tried)), np.tile(targets, 2)]
    return confidence[: len(images)], confidence[len(images) :]


def hottest(heat: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (N, H, W) True for each heatmap's hottest `HOT_SHARE` of the pixels."""
    flat = heat.reshape(len(heat), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, : round(HOT_SHARE * flat.shape[1])]
    hot = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(hot, order, values=True, axis=1)
    return hot.reshape(heat.shape)


def blur(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return images (N, 3, H, W) under a Gaussian blur; beyond the edge, an image goes on as its mirror image."""
    down, across = (_gaussian(side) for side in images.shape[-2:])
    return np.asarray(down @ images @ across.T, dtype=np.float32)


@lru_cache(maxsize=8)
def _gaussian(side: int) -> NDArray[np.float32]:
    """Return the blur of one side as a matrix (side, side), as wide as four standard deviations."""
    sigma = BLUR * side
    reach = int(4 * sigma + 0.5)
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    # Mirrored at the edges with the outermost pixel twice: d c b a | a b c d | d c b a.
    places = (np.arange(side)[:, None] + steps) % (2 * side)
    places = np.minimum(places, 2 * side - 1 - places)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], places), weights)
    return matrix.astype(np.float32)


def verdict(name: str, whole: float, kept: float, removed: float) -> str:
    """Return a sentence on what the test says about the heatmap.

    Args:
        name: the class that the heatmap is about.
        whole: the confidence in it on the whole image.
        kept: the confidence with only the hot region kept.
        removed: the confidence with the hot region removed.
    """
    if whole < SEEN:
        return f"The model hardly sees {name} in this image, so its heatmap cannot be tested."
    is_enough, is_needed = kept >= whole / 2, removed < whole / 2
    if is_enough and is_needed:
        return f"The hottest quarter decides: alone it keeps {name}, without it {name} is lost."
    if is_enough:
        return f"The hottest quarter is enough for {name}, but the rest of the image is too."
    if is_needed:
        return f"The hottest quarter is needed for {name}, but it is not enough alone."
    return f"The hottest quarter is neither enough nor needed for {name}: do not trust this heatmap."
