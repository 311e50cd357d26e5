"""Pointing games: images of several classes, of which the heat must lie on the one that was asked for.

A mosaic is four images of four classes, 2×2, at twice the input's height and width. The network takes it as it is, for
it is convolutional up to the average over places. Source: the Grid Pointing Game, Böhle et al. 2021, section 4.1,
https://arxiv.org/abs/2104.00032; the peak is the Pointing Game of Zhang et al. 2016, https://arxiv.org/abs/1608.00507

A half-and-half image has the input's own size: the middle halves of two images of two classes, side by side.

A method that lets classes compete for each place is at an advantage here, since these images have exactly one class at
each place. The games do not tell whether such a method hides evidence that two classes share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from training.evaluate.heatmaps.passes import Explain

MOSAICS = 50
"""Mosaics, with four heatmaps each: the standard error of a share near 0.9 is then about 0.01."""

HALVES = 100

LARGE_SIDE, LARGE_SHARE = 64, 4
"""Inputs above this side get a quarter of the images: one costs fifty times more."""


@dataclass(frozen=True)
class Scene:
    """Images (N, 3, H, W) of P classes each, `classes` (N, P), with each class's place as (rows, columns)."""

    images: NDArray[np.float32]
    classes: NDArray[np.intp]
    places: tuple[tuple[slice, slice], ...]


@dataclass(frozen=True)
class Pointing:
    """Share of the heat in the place of the class asked for, and share of images whose hottest pixel is there."""

    share: float
    peak: float


def mosaics(images: NDArray[np.float32], labels: NDArray[np.intp]) -> Scene | None:
    """Return 2×2 mosaics of images of four classes; None if there are not four classes."""
    drawn = _draw(images, labels, 4, MOSAICS)
    if drawn is None:
        return None
    tiles, classes = drawn
    rows = [np.concatenate([tiles[:, left], tiles[:, left + 1]], axis=3) for left in (0, 2)]
    height, width = images.shape[2:]
    bands, columns = (slice(0, height), slice(height, None)), (slice(0, width), slice(width, None))
    return Scene(np.concatenate(rows, axis=2), classes, tuple((band, column) for band in bands for column in columns))


def halves(images: NDArray[np.float32], labels: NDArray[np.intp]) -> Scene | None:
    """Return images whose left half is of one class and whose right half is of another; None if there is one class."""
    drawn = _draw(images, labels, 2, HALVES)
    if drawn is None:
        return None
    tiles, classes = drawn
    width = images.shape[3]
    left, right = width // 2, width - width // 2
    start = width // 4
    pieces = [tiles[:, 0, :, :, start : start + left], tiles[:, 1, :, :, start : start + right]]
    whole = slice(None)
    return Scene(np.concatenate(pieces, axis=3), classes, ((whole, slice(0, left)), (whole, slice(left, None))))


def point(network: nn.Module, explain: Explain, scene: Scene) -> Pointing:
    """Return the result of asking for each class of each image; a heatmap without heat has missed."""
    shares, peaks = [], []
    for part, (rows, columns) in enumerate(scene.places):
        heat = explain(network, scene.images, scene.classes[:, part])
        inside = heat[:, rows, columns]
        total = heat.sum(axis=(1, 2), dtype=np.float64)
        own = inside.sum(axis=(1, 2), dtype=np.float64)
        shares.append(np.divide(own, total, out=np.zeros_like(total), where=total > 0))
        peaks.append((total > 0) & (inside.max(axis=(1, 2)) == heat.max(axis=(1, 2))))
    return Pointing(float(np.mean(shares)), float(np.mean(peaks)))


def _draw(
    images: NDArray[np.float32], labels: NDArray[np.intp], parts: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.intp]] | None:
    """Return images (N, parts, 3, H, W) of different classes (N, parts), always the same; None for too few classes."""
    known = np.unique(labels)
    if len(known) < parts:
        return None
    if max(images.shape[2:]) > LARGE_SIDE:
        count //= LARGE_SHARE
    rng = np.random.default_rng(0)
    classes = np.stack([rng.choice(known, parts, replace=False) for _ in range(count)])
    chosen = [[rng.choice(np.flatnonzero(labels == label)) for label in row] for row in classes]
    return images[np.array(chosen)], classes
