"""Make images that no network of ours was trained for, out of a data set's own images or of nothing.

They choose the method of familiarity at packing. The images on which familiarity is reported (benchmarks/familiar.py)
are others, from other sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from training.data.fractals import draw_fractals

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Maker = Callable[[Pixels, np.random.Generator], Pixels]

BLUR = 1 / 8
"""The blur's standard deviation as a share of the image's shorter side: patches of colour are left."""

TILES = 4
"""Tiles a side: a quarter of an image shows a part of an object at most."""


def make_unfamiliar(images: Pixels, seed: int = 0) -> dict[str, Pixels]:
    """Return (N, H, W, 3) uint8 for each of `KINDS`, made of N `images`; the same ones for the same `seed`."""
    return {
        kind: make(images, np.random.default_rng([seed, number])) for number, (kind, make) in enumerate(KINDS.items())
    }


def _noise(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Return normal noise with each image's own mean and standard deviation."""
    mean, deviation = images.mean(axis=(1, 2), keepdims=True), images.std(axis=(1, 2), keepdims=True)
    return _pixels(rng.normal(mean, deviation, images.shape))


def _blur(images: Pixels, _: np.random.Generator) -> Pixels:
    sigma = BLUR * min(images.shape[1:3])
    return _pixels(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0)))


def _scrambled(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Return textures: the images' spectra with random phases, the same ones for all channels.

    Source: Galerne et al. 2011, section 2, https://doi.org/10.1109/TIP.2010.2052822
    """
    spectra = np.fft.fft2(images, axes=(1, 2))
    phases = np.exp(1j * np.angle(np.fft.fft2(rng.normal(size=images.shape[:3]), axes=(1, 2))))
    phases[:, 0, 0] = 1  # the mean colour stays
    return _pixels(np.fft.ifft2(spectra * phases[..., None], axes=(1, 2)).real)


def _tiles(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Return mosaics of 4×4 tiles, each from the same place of another image."""
    mosaics = images.copy()
    for place in _places(images):
        mosaics[:, *place] = images[rng.permutation(len(images))][:, *place]
    return mosaics


def _shuffled(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Return each image with its 4×4 tiles in random order."""
    shuffled, places = images.copy(), _places(images)
    for number in range(len(images)):
        for place, other in zip(places, rng.permutation(len(places)), strict=True):
            shuffled[number, *place] = images[number, *places[other]]
    return shuffled


def _fractals(images: Pixels, rng: np.random.Generator) -> Pixels:
    height, width = images.shape[1:3]
    drawn = draw_fractals(len(images), max(height, width), int(rng.integers(2**31)), torch.device("cpu"))
    return drawn.permute(0, 2, 3, 1).numpy()[:, :height, :width]


KINDS: dict[str, Maker] = {
    "noise": _noise,
    "blur": _blur,
    "scrambled": _scrambled,
    "tiles": _tiles,
    "shuffled": _shuffled,
    "fractals": _fractals,
}
"""Makers by name, from far to strange; functions take images (N, H, W, 3) and a generator."""


def _places(images: Pixels) -> list[tuple[slice, slice]]:
    """Return rows and columns of each tile, all of one size; what is left over at the edges belongs to none."""
    height, width = (side // TILES for side in images.shape[1:3])
    return [
        (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        for row in range(TILES)
        for column in range(TILES)
    ]


def _pixels(values: NDArray[np.float64] | NDArray[np.float32]) -> Pixels:
    return np.clip(values.round(), 0, 255).astype(np.uint8)
