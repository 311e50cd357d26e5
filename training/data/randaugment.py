"""torchvision's RandAugment for arrays: the same images from the same random numbers, in a fraction of the time.

On two cores the loader's process takes from the training what it needs, and more: while it has a core, the other waits
for that core's share of a convolution. So images are varied together, those of a batch that drew the same operation.
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
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Images = NDArray[np.uint8]  # (N, 3, H, W)

Operation = tuple[str, float]  # its name in torchvision and its magnitude

# With the nearest neighbour for interpolation, these move pixels and change none: where to is the same each time.
_MOVES = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
_VALUES = np.arange(256)
_LUMA = np.array([19_595, 38_470, 7_471], np.float32)


class ArrayRandAugment:
    """`operations` random ones of torchvision's 14, at `magnitude` of 31, to images of one size.

    Source: Cubuk et al. 2019, https://arxiv.org/abs/1909.13719
    """

    def __init__(self, operations: int, magnitude: int, *, size: tuple[int, int], fill: list[int]) -> None:
        """Takes the images' (height, width), and the colour of what a shift uncovers."""
        self.operations = operations
        self._fill = np.array(fill, np.uint8)[:, None]
        bins = 31
        space = RandAugment(operations, magnitude)._augmentation_space(bins, size)  # noqa: SLF001 - made once, not for each image
        self._space = [
            (name, float(values[magnitude]) if values.ndim else 0.0, signed) for name, (values, signed) in space.items()
        ]
        self._origins = {
            (name, either): _origins(name, either, size)
            for name, magnitude, _ in self._space
            if name in _MOVES
            for either in (magnitude, -magnitude)
        }

    def draw(self) -> list[Operation]:
        """What to do with an image, drawn from torch's global generator as torchvision draws it."""
        drawn = []
        for _ in range(self.operations):
            name, magnitude, signed = self._space[int(torch.randint(len(self._space), (1,)))]
            drawn.append((name, -magnitude if signed and torch.randint(2, (1,)) else magnitude))
        return drawn

    def vary(self, images: Images, drawn: Sequence[Sequence[Operation]]) -> None:
        """Varies `images` (N, 3, H, W) in place, each by the operations drawn for it, one after the other."""
        for step in range(self.operations):
            places: dict[Operation, list[int]] = {}
            for place, operations in enumerate(drawn):
                places.setdefault(operations[step], []).append(place)
            for operation, chosen in places.items():
                images[chosen] = self._varied(images[chosen], *operation)

    def _varied(self, images: Images, name: str, magnitude: float) -> Images:
        if name not in _MOVES:
            return _CHANGES[name](images, magnitude)
        uncovered = np.broadcast_to(self._fill, (len(images), 3, 1))
        known = np.concatenate([uncovered, images.reshape(len(images), 3, -1)], axis=2)
        return known.take(self._origins[name, magnitude], axis=2, mode="clip")  # 'clip' spares a check of each index


def _origins(name: str, magnitude: float, size: tuple[int, int]) -> NDArray[np.intp]:
    """Where each pixel (H, W) comes from: 0 from nowhere, else one more than its place in the image.

    Seen on an image of these numbers, in base 256, which torchvision moves.
    """
    places = np.arange(1, size[0] * size[1] + 1).reshape(size)
    image = Image.fromarray(np.stack([places >> 16, places >> 8, places], axis=-1).astype(np.uint8))
    moved = np.asarray(_apply_op(image, name, magnitude, InterpolationMode.NEAREST, [0, 0, 0]))
    origins: NDArray[np.intp] = moved @ np.array([65_536, 256, 1])
    return origins


def _identity(images: Images, _: float) -> Images:
    return images


def _brightness(images: Images, magnitude: float) -> Images:
    return _blended(images, np.zeros(1, np.float32), magnitude)


def _contrast(images: Images, magnitude: float) -> Images:
    means = _grey(images).mean(axis=(1, 2, 3), dtype=float)
    return _blended(images, np.floor(means + 0.5).astype(np.float32)[:, None, None, None], magnitude)


def _color(images: Images, magnitude: float) -> Images:
    return _blended(images, _grey(images), magnitude)


def _sharpness(images: Images, magnitude: float) -> Images:
    smooth = images.astype(np.float32)  # what has not all its neighbours stays as it is
    wide = images.astype(np.uint16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26  # thirteenths, of which the pixel itself has five, rounded
    return _blended(images, smooth, magnitude)


def _grey(images: Images) -> NDArray[np.float32]:
    """ITU-R 601-2 in whole 1/65536, as Pillow rounds it: (N, 1, H, W) float32, which is exact up to 2²⁴."""
    count, _, height, width = images.shape
    luma = _LUMA @ images.reshape(count, 3, -1).astype(np.float32)
    return np.floor((luma + 32_768) / 65_536).reshape(count, 1, height, width)


def _blended(images: Images, dull: NDArray[np.float32], magnitude: float) -> Images:
    """`1 + magnitude` of the images and the rest of dull ones, in single precision as Pillow does it."""
    values = images - dull
    values *= np.float32(1 + magnitude)
    values += dull
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _posterize(images: Images, bits: float) -> Images:
    return images & np.uint8(256 - 2 ** (8 - int(bits)))


def _solarize(images: Images, threshold: float) -> Images:
    return np.where(images < threshold, images, ~images)


def _autocontrast(images: Images, _: float) -> Images:
    """Each channel stretched to 0..255."""
    planes = images.reshape(-1, images[0, 0].size)
    low, high = planes.min(axis=1).astype(float), planes.max(axis=1).astype(float)
    is_flat = high == low
    scale = 255 / np.where(is_flat, 255, high - low)
    offset = np.where(is_flat, 0, -low * scale)
    return _looked_up(np.clip(_VALUES * scale[:, None] + offset[:, None], 0, 255), planes).reshape(images.shape)


def _equalize(images: Images, _: float) -> Images:
    """Each channel's values spread so that all are as frequent."""
    planes = images.reshape(-1, images[0, 0].size)
    counts = np.stack([np.bincount(plane, minlength=256) for plane in planes])
    of_brightest = np.take_along_axis(counts, planes.max(axis=1, keepdims=True).astype(np.intp), axis=1)
    step = (planes.shape[1] - of_brightest) // 255
    below = np.cumsum(counts, axis=1) - counts
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return _looked_up(np.where(step, spread, _VALUES), planes).reshape(images.shape)


def _looked_up(tables: NDArray[Any], planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each of `planes` (K, pixels) through its own of `tables` (K, 256)."""
    return np.stack([t.take(plane, mode="clip") for t, plane in zip(tables.astype(np.uint8), planes, strict=True)])


_CHANGES: dict[str, Callable[[Images, float], Images]] = {
    "Identity": _identity,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
