"""torchvision's RandAugment for arrays: the same pictures from the same random numbers, in a fraction of the time.

On two cores the loader's process takes from the training what it needs, and more: while it has a core, the other waits
for that core's share of a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from handlers import network  # noqa: F401 - makes torchvision importable beside a CPU-only torch

# After handlers.network, which declares what torchvision's import needs.
from torchvision.transforms import InterpolationMode, RandAugment  # isort: skip
from torchvision.transforms.autoaugment import _apply_op  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

# With the nearest neighbour for interpolation, these move pixels and change none: where to is the same each time.
_MOVES = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
_VALUES = np.arange(256)
_LUMA = np.array([19_595, 38_470, 7_471])  # ITU-R 601-2 in 1/65536, as Pillow rounds it


class ArrayRandAugment:
    """`operations` random ones of torchvision's 14, at `magnitude` of 31, to pictures (H, W, 3) uint8 of one size.

    Source: Cubuk et al. 2019, https://arxiv.org/abs/1909.13719
    """

    def __init__(self, operations: int, magnitude: int, *, size: tuple[int, int], fill: list[int]) -> None:
        """Takes the pictures' (height, width), and the colour of what a shift uncovers."""
        self.operations = operations
        self._fill = np.array([fill], np.uint8)
        bins = 31
        space = RandAugment(operations, magnitude)._augmentation_space(bins, size)  # noqa: SLF001 - made once, not for each picture
        self._space = [
            (name, float(values[magnitude]) if values.ndim else 0.0, signed) for name, (values, signed) in space.items()
        ]
        self._origins = {
            (name, either): _origins(name, either, size)
            for name, magnitude, _ in self._space
            if name in _MOVES
            for either in (magnitude, -magnitude)
        }

    def __call__(self, pixels: Pixels) -> Pixels:
        """The varied picture; draws from torch's global generator as torchvision does."""
        for _ in range(self.operations):
            name, magnitude, signed = self._space[int(torch.randint(len(self._space), (1,)))]
            if signed and torch.randint(2, (1,)):
                magnitude = -magnitude
            if name in _MOVES:
                known = np.concatenate([self._fill, pixels.reshape(-1, 3)])
                pixels = known.take(self._origins[name, magnitude], axis=0, mode="clip")
            elif own := _ON_ARRAYS.get(name):
                pixels = own(pixels, magnitude)
            else:
                pixels = np.asarray(_by_torchvision(Image.fromarray(np.ascontiguousarray(pixels)), name, magnitude))
        return pixels


def _origins(name: str, magnitude: float, size: tuple[int, int]) -> NDArray[np.intp]:
    """Where each pixel (H, W) comes from: 0 from nowhere, else one more than its place in the picture.

    Seen on a picture of these numbers, in base 256.
    """
    places = np.arange(1, size[0] * size[1] + 1).reshape(size)
    image = Image.fromarray(np.stack([places >> 16, places >> 8, places], axis=-1).astype(np.uint8))
    origins: NDArray[np.intp] = np.asarray(_by_torchvision(image, name, magnitude)) @ np.array([65_536, 256, 1])
    return origins


def _by_torchvision(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    # Filled with 0 where a move uncovers, which `_origins` counts on; what else comes here uncovers nothing.
    varied: Image.Image = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, [0, 0, 0])
    return varied


def _identity(pixels: Pixels, _: float) -> Pixels:
    return pixels


def _brightness(pixels: Pixels, magnitude: float) -> Pixels:
    return _blended(pixels, 0, 1 + magnitude)


def _contrast(pixels: Pixels, magnitude: float) -> Pixels:
    return _blended(pixels, int(_grey(pixels).mean() + 0.5), 1 + magnitude)


def _color(pixels: Pixels, magnitude: float) -> Pixels:
    grey = _grey(pixels)[..., None]
    values = grey.astype(np.float32) + np.float32(1 + magnitude) * (pixels - grey).astype(np.float32)
    return np.clip(values, 0, 255).astype(np.uint8)


def _grey(pixels: Pixels) -> NDArray[np.intp]:
    grey: NDArray[np.intp] = pixels @ _LUMA + 32_768 >> 16
    return grey


def _blended(pixels: Pixels, grey: int, share: float) -> Pixels:
    """`share` of the picture and the rest of a grey, in single precision as Pillow does it."""
    values = np.float32(grey) + np.float32(share) * (_VALUES - grey).astype(np.float32)
    return _looked_up(np.clip(values, 0, 255), pixels)


def _posterize(pixels: Pixels, bits: float) -> Pixels:
    return pixels & np.uint8(256 - 2 ** (8 - int(bits)))


def _solarize(pixels: Pixels, threshold: float) -> Pixels:
    return _looked_up(np.where(threshold > _VALUES, _VALUES, 255 - _VALUES), pixels)


def _autocontrast(pixels: Pixels, _: float) -> Pixels:
    """Each channel stretched to 0..255."""
    stretched = np.empty_like(pixels)
    for channel in range(3):
        plane = pixels[..., channel]
        low, high = int(plane.min()), int(plane.max())
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        stretched[..., channel] = _looked_up(np.clip(_VALUES * scale + offset, 0, 255), plane)
    return stretched


def _equalize(pixels: Pixels, _: float) -> Pixels:
    """Each channel's values spread so that all are as frequent."""
    equalized = pixels.copy()
    for channel in range(3):
        plane = pixels[..., channel]
        counts = np.bincount(plane.ravel(), minlength=256)
        step = (plane.size - int(counts[plane.max()])) // 255
        if step:
            below = np.cumsum(counts) - counts
            equalized[..., channel] = _looked_up(np.minimum((step // 2 + below) // step, 255), plane)
    return equalized


def _looked_up(table: NDArray[Any], pixels: Pixels) -> Pixels:
    return np.take(table.astype(np.uint8), pixels, mode="clip")  # 'clip' spares a check of each index


# Those that take Pillow longer, mostly because it makes a table in Python for each picture.
_ON_ARRAYS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "Identity": _identity,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
