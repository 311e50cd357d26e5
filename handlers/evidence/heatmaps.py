"""Heatmaps in closed form, from the outputs of one forward pass.

A network that averages its last activations `A_k` (h, w) over all places and ends in one linear head with weights
`w_ck` has class maps `M_c = Σ_k w_ck A_k`, whose mean over the places is the logit of class `c`, less its bias. The
gradient of that logit is `w_ck / hw` at every place, so Grad-CAM at the last layer is `ReLU(M_c)` up to its scale.
Source: Zhou et al. 2016, section 2, https://arxiv.org/abs/1512.04150; Selvaraju et al. 2017, section 3.1,
https://arxiv.org/abs/1610.02391

`cam` is that map. `sharpcam` multiplies it, resized to the places of an earlier layer, by that layer's sharpness `S`:
that has more places, but knows no class. `contrastcam` multiplies it also by the class's share against all other
classes at each of these places:

    heat_c = ReLU(M_c) · softmax_c(M / τ) · S

with `τ` a quarter of the standard deviation of the image's class maps. docs/explanation/explanations.md has the
measurements, and what such a map does not tell.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from handlers.engines import Outputs

FORWARD_METHODS = ("cam", "sharpcam", "contrastcam")
"""Methods that need no pass but the one that answered."""

CONTRAST = 0.25
"""The temperature of the competition between classes, in standard deviations of an image's class maps."""


def heatmap(
    outputs: Outputs, targets: NDArray[np.intp], method: str, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return each image's heatmap for its target class, and how strong it is.

    Args:
        outputs: those of N images.
        targets: (N,) class indices.
        method: one of `FORWARD_METHODS`.
        size: (height, width) of the heatmaps, in pixels.

    Returns:
        Heat (N, height, width) float32, from 0 (no support) to 1, each scaled to its own maximum; strength (N,)
        float32, the maximum before that, in logits: comparable between the classes of one image. Both are 0 where
        nothing supports the class.

    Raises:
        ValueError: the method is unknown, or the outputs lack what it needs.
    """
    if method not in FORWARD_METHODS:
        raise ValueError(f"unknown heatmap method {method!r}: use one of {', '.join(FORWARD_METHODS)}")
    if outputs.maps is None or (outputs.sharpness is None and method != "cam"):
        raise ValueError(f"this network gives no {method}: use a method with a backward pass")
    if method == "cam" or outputs.sharpness is None:
        heat = resize(_support(outputs.maps, targets), size)
    else:
        heat = resize(_sharp_support(outputs.maps, outputs.sharpness, targets, contrast=method == "contrastcam"), size)
    return _scaled(heat), heat.max(axis=(1, 2))


def _sharp_support(
    maps: NDArray[np.float32], sharpness: NDArray[np.float32], targets: NDArray[np.intp], *, contrast: bool
) -> NDArray[np.float32]:
    """Return the support for each target at the places of `sharpness`, (N, h', w')."""
    places = (sharpness.shape[1], sharpness.shape[2])
    if not contrast:
        return resize(_support(maps, targets), places) * _scaled(sharpness)
    # Resized first: the border between two classes then runs where their maps cross, not along the coarse places.
    fine = resize(maps, places)
    return _support(fine, targets) * _of_targets(class_shares(fine), targets) * _scaled(sharpness)


def class_shares(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the softmax over classes of the class maps at each place, (N, K, h, w), at the temperature `CONTRAST`."""
    spread = maps.std(axis=(1, 2, 3), keepdims=True)
    logits: NDArray[np.float32] = np.divide(maps, CONTRAST * spread, out=np.zeros_like(maps), where=spread > 0)
    odds: NDArray[np.float32] = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    return odds


def resize(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return maps (…, h, w) at (height, width) `size` by bilinear interpolation between the centres of their places.

    Beyond the outermost centres the outermost values go on, as in OpenCV's `resize` and PyTorch's `interpolate`.
    """
    down, across = _weights(maps.shape[-2], size[0]), _weights(maps.shape[-1], size[1])
    return np.asarray(down @ maps @ across.T, dtype=np.float32)


@lru_cache(maxsize=32)
def _weights(places: int, pixels: int) -> NDArray[np.float32]:
    """Return each place's weight in each pixel, (pixels, places)."""
    centres = np.clip((np.arange(pixels) + 0.5) * places / pixels - 0.5, 0, places - 1)
    weights: NDArray[np.float32] = np.maximum(1 - np.abs(centres[:, None] - np.arange(places)), 0).astype(np.float32)
    return weights


def _support(maps: NDArray[np.float32], targets: NDArray[np.intp]) -> NDArray[np.float32]:
    return np.maximum(_of_targets(maps, targets), 0)


def _of_targets(maps: NDArray[np.float32], targets: NDArray[np.intp]) -> NDArray[np.float32]:
    chosen: NDArray[np.float32] = maps[np.arange(len(targets)), targets]
    return chosen


def _scaled(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return maps (N, h, w), not negative, each divided by its own maximum."""
    most = maps.max(axis=(1, 2), keepdims=True)
    scaled: NDArray[np.float32] = np.divide(maps, most, out=np.zeros_like(maps), where=most > 0)
    return scaled
