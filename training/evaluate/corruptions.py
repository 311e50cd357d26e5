"""Corrupts images as CIFAR-10-C does: 15 kinds of noise, blur, weather and loss, each in five severities.

Implemented from the published parameters, for images of 32×32 pixels; accuracies come near those on the published
files but are not the same. Its frost lays photographs of ice over an image; ours, needles drawn from noise. Source:
Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261, with the constants of make_cifar_c.py in
https://github.com/hendrycks/robustness
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Values = NDArray[np.float64]  # 0..1
    Corruption = Callable[[Values, int, np.random.Generator], Values]

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Pixels, kind: str, severity: int, seed: int = 0) -> Pixels:
    """Return `images` (N, H, W, 3) uint8 corrupted; the same ones for the same `seed`.

    Args:
        images: what to corrupt.
        kind: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of all that is random.
    """
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(kind), severity])
    corrupted = CORRUPTIONS[kind](images / 255, severity - 1, rng)
    return (255 * np.clip(corrupted, 0, 1)).astype(np.uint8)


def _gaussian_noise(images: Values, level: int, rng: np.random.Generator) -> Values:
    return images + rng.normal(0, (0.04, 0.06, 0.08, 0.09, 0.10)[level], images.shape)


def _shot_noise(images: Values, level: int, rng: np.random.Generator) -> Values:
    photons = (500, 250, 100, 75, 50)[level]
    return rng.poisson(images * photons) / photons


def _impulse_noise(images: Values, level: int, rng: np.random.Generator) -> Values:
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    drawn = rng.random(images.shape)
    return np.where(drawn < amount / 2, 0.0, np.where(drawn < amount, 1.0, images))


def _defocus_blur(images: Values, level: int, _rng: np.random.Generator) -> Values:
    radius, smoothing = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[level]
    places = np.arange(-8, 9)
    disk = (places**2 + places[:, None] ** 2 <= radius**2).astype(np.float64)
    kernel = cv2.GaussianBlur(disk / disk.sum(), ksize=(3, 3), sigmaX=smoothing)
    return np.stack([cv2.filter2D(image, -1, kernel) for image in images])


def _glass_blur(images: Values, level: int, rng: np.random.Generator) -> Values:
    sigma, iterations = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[level]
    blurred = gaussian_filter(images, (0, sigma, sigma, 0))
    everyone = np.arange(len(images))
    height, width = images.shape[1:3]
    for _ in range(iterations):
        for row in range(height - 1, 1, -1):
            for column in range(width - 1, 1, -1):
                down, right = rng.integers(-1, 1, (2, len(images)))
                # The published code means to swap the two, but copies one.
                blurred[:, row, column] = blurred[everyone, row + down, column + right]
    result: Values = gaussian_filter(blurred, (0, sigma, sigma, 0))
    return result


def _motion_blur(images: Values, level: int, rng: np.random.Generator) -> Values:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[level]
    return _moved(images, radius, sigma, rng.uniform(-45, 45, len(images)))


def _zoom_blur(images: Values, level: int, _rng: np.random.Generator) -> Values:
    largest = (1.06, 1.11, 1.16, 1.21, 1.26)[level]
    zooms = np.arange(1, largest, 0.01)
    return (images + sum(_zoomed(images, zoom) for zoom in zooms)) / (len(zooms) + 1)


def _snow(images: Values, level: int, rng: np.random.Generator) -> Values:
    mean, deviation, zoom, threshold, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]
    flakes = _zoomed(rng.normal(mean, deviation, (*images.shape[:3], 1)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _moved(flakes, radius, sigma, rng.uniform(-135, -45, len(images)))
    grey = images @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    pale = kept * images + (1 - kept) * np.maximum(images, 1.5 * grey[..., None] + 0.5)
    result: Values = pale + flakes + np.rot90(flakes, 2, axes=(1, 2))
    return result


def _frost(images: Values, level: int, rng: np.random.Generator) -> Values:
    kept, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    noise = rng.normal(size=(3, *images.shape[:3]))
    needles = [
        gaussian_filter(layer, (0, *widths)) for layer, widths in zip(noise, ((3, 0.5), (0.5, 3), (1, 1)), strict=True)
    ]
    texture = np.max(needles, axis=0)
    low, high = texture.min(axis=(1, 2), keepdims=True), texture.max(axis=(1, 2), keepdims=True)
    blue = np.array([0.85, 0.95, 1.0])
    result: Values = kept * images + ice * ((texture - low) / (high - low))[..., None] * blue
    return result


def _fog(images: Values, level: int, rng: np.random.Generator) -> Values:
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    clouds = _plasma(len(images), images.shape[1:3], decay, rng)
    result: Values = (images + strength * clouds[..., None]) * brightest / (brightest + strength)
    return result


def _brightness(images: Values, level: int, _rng: np.random.Generator) -> Values:
    """Add to the value of hue, saturation and value: all channels of a pixel grow by one factor."""
    value = images.max(axis=-1, keepdims=True)
    brighter = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[level], 0, 1)
    result: Values = np.where(value > 0, images * brighter / np.maximum(value, 1e-9), brighter)
    return result


def _contrast(images: Values, level: int, _rng: np.random.Generator) -> Values:
    means = images.mean(axis=(1, 2), keepdims=True)
    result: Values = (images - means) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + means
    return result


def _elastic_transform(images: Values, level: int, rng: np.random.Generator) -> Values:
    strength, smoothness, slant = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[level]
    return np.stack([_bent(image, strength, smoothness, slant, rng) for image in images])


def _pixelate(images: Values, level: int, _rng: np.random.Generator) -> Values:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[level]
    height, width = images.shape[1:3]
    small = (int(width * share), int(height * share))
    box = Image.Resampling.BOX
    return (
        np.stack([np.asarray(_image(image).resize(small, box).resize((width, height), box)) for image in images]) / 255
    )


def _jpeg_compression(images: Values, level: int, _rng: np.random.Generator) -> Values:
    compressed = []
    for image in images:
        file = io.BytesIO()
        _image(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[level])
        compressed.append(np.asarray(Image.open(file)))
    return np.stack(compressed) / 255


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""By the names of CIFAR-10-C. Functions take images (N, H, W, 3) in 0..1, and the severity from 0."""


def _image(image: Values) -> Image.Image:
    return Image.fromarray((255 * image).round().astype(np.uint8))


def _moved(images: Values, radius: int, sigma: float, angles: Values) -> Values:
    """Return images blurred along `angles` (N,), in degrees, as a camera that moves would: towards one side.

    Source: ImageMagick's MotionBlurImage, https://imagemagick.org/script/command-line-options.php#motion-blur
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    everyone = np.arange(len(images))[:, None, None]
    height, width = images.shape[1:3]
    blurred = np.zeros_like(images)
    for step, weight in zip(steps, weights, strict=True):
        down, right = (np.ceil(step * part(np.deg2rad(angles)) - 0.5).astype(int) for part in (np.sin, np.cos))
        rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
        columns = np.clip(np.arange(width) + right[:, None], 0, width - 1)
        blurred += weight * images[everyone, rows[:, :, None], columns[:, None, :]]
    return blurred


def _zoomed(images: Values, zoom: float) -> Values:
    """Return the middle of images (N, H, W, C), enlarged by `zoom`."""
    height, width = images.shape[1:3]
    cut = int(np.ceil(height / zoom)), int(np.ceil(width / zoom))
    top, left = ((length - part) // 2 for length, part in zip((height, width), cut, strict=True))
    middle = images[:, top : top + cut[0], left : left + cut[1]]
    # The enlarged middle, corner to corner, is a little larger than the image and cut to it.
    sides = [round(part * zoom) for part in cut]
    rows, columns = (
        (np.arange(length) + (side - length) // 2) * ((part - 1) / (side - 1))
        for length, side, part in zip((height, width), sides, cut, strict=True)
    )
    return _interpolated(_interpolated(middle, rows, 1), columns, 2)


def _interpolated(images: Values, places: Values, axis: int) -> Values:
    """Return the values at the fractional `places` of `axis`."""
    below = np.minimum(np.floor(places).astype(int), images.shape[axis] - 1)
    above = np.minimum(below + 1, images.shape[axis] - 1)
    shape = [1] * images.ndim
    shape[axis] = -1
    share = (places - below).reshape(shape)
    result: Values = (1 - share) * images.take(below, axis) + share * images.take(above, axis)
    return result


def _plasma(count: int, shape: tuple[int, ...], decay: float, rng: np.random.Generator) -> Values:
    """Return clouds (N, *shape) in 0..1, by the diamond-square algorithm on a torus.

    Source: Fournier, Fussell and Carpenter 1982, https://doi.org/10.1145/358523.358553
    """
    side = 1 << (max(shape) - 1).bit_length()
    clouds = np.zeros((count, side, side))
    step, wobble = side, 100.0
    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        clouds[:, half::step, half::step] = _wobbled(_with_next(_with_next(corners, 1), 2), wobble, rng)
        centres = clouds[:, half::step, half::step]
        above_and_below = centres + np.roll(centres, 1, axis=1)
        clouds[:, ::step, half::step] = _wobbled(above_and_below + _with_next(corners, 2), wobble, rng)
        left_and_right = centres + np.roll(centres, 1, axis=2)
        clouds[:, half::step, ::step] = _wobbled(left_and_right + _with_next(corners, 1), wobble, rng)
        step, wobble = half, wobble / decay
    clouds = clouds[:, : shape[0], : shape[1]]
    low, high = clouds.min(axis=(1, 2), keepdims=True), clouds.max(axis=(1, 2), keepdims=True)
    result: Values = (clouds - low) / (high - low)
    return result


def _with_next(grid: Values, axis: int) -> Values:
    return grid + np.roll(grid, -1, axis=axis)


def _wobbled(sums: Values, wobble: float, rng: np.random.Generator) -> Values:
    return sums / 4 + wobble * rng.uniform(-wobble, wobble, sums.shape)


def _bent(image: Values, strength: float, smoothness: float, slant: float, rng: np.random.Generator) -> Values:
    """Return one image (H, W, 3) after a random affine map, with a smooth random displacement of each pixel."""
    height, width = image.shape[:2]
    side = min(height, width)
    middle, third = np.array([height // 2, width // 2]), side // 3
    corners = np.array([middle + third, [middle[0] + third, middle[1] - third], middle - third], np.float32)
    moved = corners + rng.uniform(-slant * side, slant * side, corners.shape).astype(np.float32)
    affine = cv2.getAffineTransform(corners, moved)
    slanted = cv2.warpAffine(image, affine, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    down, right = (
        strength * side * gaussian_filter(rng.uniform(-1, 1, (height, width)), smoothness * side, truncate=3)
        for _ in range(2)
    )
    rows, columns = np.mgrid[:height, :width]
    places = np.array([rows + down, columns + right])
    return np.stack([map_coordinates(slanted[..., c], places, order=1, mode="reflect") for c in range(3)], axis=-1)
