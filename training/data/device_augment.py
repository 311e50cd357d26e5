"""Augments training images on the device that trains, where they all lie: a GPU waits for no loader.

Images are augmented some thousands together. Each has random draws of its own, from (seed, epoch, index) alone, so a
resumed training sees the same ones. The draws are not those of `training.data.augment`, which augments on processors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import atan, degrees
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training.data.augment import CROP_PADDING, flipped
from training.data.fractals import draw_fractals
from training.recipe import Augmentation

# After training.data.augment, which makes torchvision importable beside a CPU-only torch.
from torchvision.transforms import InterpolationMode, RandAugment  # isort: skip
from torchvision.transforms.v2 import CutMix  # isort: skip
from torchvision.transforms.v2 import functional as F  # noqa: N812 - isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from contracts.model import Input
    from training.data.augment import EpochBatches
    from training.data.images import Images

    Operation = Callable[[Tensor], Tensor]

_BLOCK_PIXELS = 2**23  # augmented together: 8,192 images of 32×32
_BINS = 31  # strengths of torchvision's RandAugment
_FRACTALS = 2048
_FRACTAL_MARGIN = 1.25  # a fractal's side, of the image's: it is cut at a random place
# Source of the following: Hendrycks et al. 2021, section 3 and its code, https://arxiv.org/abs/2112.05135
_MOST_MIXINGS = 4
_MIXING_STRENGTH = 3  # β of the Beta distribution


class DeviceLoader:
    """The training images on `device`, and an iterator over an epoch's augmented batches of them.

    Yields images (N, 3, H, W) float32, normalised, and labels: (N,) int64, or (N, classes) float32 where CutMix joined
    images. With `views` above 1 images are (N, 3·views, H, W): all views of an image are shifted, flipped and joined
    alike, the first has no other augmentation, and the others have draws of their own.
    """

    def __init__(
        self,
        images: Images,
        size: Input,
        augmentation: Augmentation,
        batches: EpochBatches,
        *,
        seed: int,
        device: torch.device,
        views: int = 1,
    ) -> None:
        """Copy the images to the device; `batches` orders them, and its `epoch` is set by the loop."""
        self.batches = batches
        self.augmentation = augmentation
        self.seed = seed
        self.views = views
        self._images = torch.from_numpy(images.images).to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (size.mean, size.std)
        )
        shape = images.images.shape[1:3]
        self._operations = randaugment_operations(
            augmentation.magnitude, shape, [255 * mean for mean in size.mean], bilinear=augmentation.bilinear
        )
        self._cutmix = CutMix(num_classes=len(images.classes))
        if augmentation.pixmix:
            side = round(_FRACTAL_MARGIN * max(shape))
            self._fractals = draw_fractals(_FRACTALS, side, seed, device).permute(0, 2, 3, 1).contiguous()

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the epoch `batches.epoch`."""
        epoch = self.batches.epoch
        rng = np.random.default_rng([self.seed, epoch])
        draws = self._draw(rng, epoch)
        parts = list(self.batches.indices())
        mixed = rng.random(len(parts)) < self.augmentation.cutmix
        seeds = rng.integers(2**32, size=len(parts))
        together = max(1, _BLOCK_PIXELS // (self.views * len(parts[0]) * self._images[0, ..., 0].numel()))
        for start in range(0, len(parts), together):
            block = parts[start : start + together]
            indices = np.concatenate(block)
            images = torch.cat([self._augmented(indices, view) for view in draws], dim=1)
            for number, (part, batch) in enumerate(
                zip(block, images.split([len(part) for part in block]), strict=True)
            ):
                labels = self._labels[self._on_device(part)]
                if mixed[start + number]:
                    yield self._cut_and_mixed(batch, labels, int(seeds[start + number]))
                else:
                    yield batch, labels

    def _draw(self, rng: np.random.Generator, epoch: int) -> list[_Draws]:
        """Return an epoch's draws for each view."""
        count, operations = len(self._labels), len(self._operations)
        augmented = [
            _Draws.make(rng, count, self.augmentation, operations, epoch) for _ in range(max(1, self.views - 1))
        ]
        if self.views == 1:
            return augmented
        plain = _Draws.make(rng, count, Augmentation(operations=0), operations, epoch)
        return [plain, *(replace(draws, shifts=plain.shifts) for draws in augmented)]

    def _augmented(self, indices: NDArray[np.intp], draws: _Draws) -> Tensor:
        """Return the images at `indices` augmented, (N, 3, H, W) float32, normalised."""
        drawn = draws.of(indices)
        shape = self._images.shape[1:3]
        rows, columns = (
            _mirrored(side, shift) for side, shift in zip(shape, (drawn.shifts - CROP_PADDING).T, strict=True)
        )
        columns = np.where(drawn.flips[:, None], columns[:, ::-1], columns)
        cut = self._cut(self._images, indices, rows, columns)
        images = self._varied(cut, drawn.operations) / 255
        chosen = np.flatnonzero(drawn.pixmixed)
        if len(chosen):
            places = self._on_device(chosen)
            images[places] = self._pixmixed(cut[places], images[places], drawn.of(chosen))
        images.sub_(self._mean).div_(self._std)
        if drawn.erased.any():
            images.masked_fill_(self._on_device(_rectangles(drawn, shape))[:, None], 0)
        return images

    def _varied(self, images: Tensor, operations: NDArray[np.intp]) -> Tensor:
        """Return a copy of uint8 `images` after RandAugment: for each the `operations` (N, steps) drawn for it."""
        images = images.clone()
        # Each call has another number of images, for which cuDNN would search its fastest convolution again.
        with torch.backends.cudnn.flags(enabled=False):
            for drawn in operations.T:
                for number in np.unique(drawn):
                    places = self._on_device(np.flatnonzero(drawn == number))
                    images[places] = self._operations[number](images[places])
        return images

    def _pixmixed(self, images: Tensor, varied: Tensor, drawn: _Draws) -> Tensor:
        """Mix each image, or its augmented copy `varied` (0..1), with fractals and further augmented copies."""
        mixed = torch.where(self._column(drawn.starts_varied), varied, images / 255)
        again = self._varied(images, drawn.mixing_operations) / 255
        side = self._fractals.shape[1]
        for step in range(_MOST_MIXINGS):
            rows, columns = (
                np.arange(length) + (shift * (side - length + 1)).astype(np.intp)[:, None]
                for length, shift in zip(images.shape[2:], drawn.fractal_shifts[:, step].T, strict=True)
            )
            fractals = self._cut(self._fractals, drawn.fractals[:, step], rows, columns) / 255
            partner = torch.where(self._column(drawn.with_fractal[:, step]), fractals, again)
            own, other = (self._column(drawn.weights[:, step, part]) for part in (0, 1))
            added = (own * (2 * mixed - 1) + other * (2 * partner - 1) + 1) / 2
            multiplied = (2 * mixed) ** own * (2 * partner).clamp_min(1e-37) ** other / 2
            after = torch.where(self._column(drawn.adds[:, step]), added, multiplied).clamp_(0, 1)
            mixed = torch.where(self._column(drawn.mixings > step), after, mixed)
        return mixed

    def _cut_and_mixed(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            images, labels = self._cutmix(images, labels)
        return images, labels

    def _cut(
        self, images: Tensor, indices: NDArray[np.intp], rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> Tensor:
        """Return the pixels of `images` (…, H, W, 3) at `rows` (N, H') and `columns` (N, W'), as (N, 3, H', W')."""
        where = self._on_device(indices)[:, None, None], self._on_device(rows)[:, :, None]
        return images[*where, self._on_device(columns)[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def _column(self, values: NDArray[Any]) -> Tensor:
        return self._on_device(values).view(-1, 1, 1, 1)

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._images.is_cuda:
            tensor = tensor.pin_memory()  # else the copy waits until all that the GPU has to do is done
        return tensor.to(self._images.device, non_blocking=True)


@dataclass(frozen=True)
class _Draws:
    """An epoch's random choices, a row for each image."""

    shifts: NDArray[np.intp]  # (N, 2), 0..8
    flips: NDArray[np.bool_]
    operations: NDArray[np.intp]  # (N, RandAugment's steps)
    erased: NDArray[np.bool_]
    rectangle: NDArray[np.float64]  # (N, 4): area, aspect, top, left, each 0..1
    pixmixed: NDArray[np.bool_]
    mixing_operations: NDArray[np.intp]  # of the further augmented copy
    starts_varied: NDArray[np.bool_]
    mixings: NDArray[np.intp]  # 0..4
    with_fractal: NDArray[np.bool_]  # (N, 4), as the following: a mixing's partner is a fractal
    fractals: NDArray[np.intp]
    fractal_shifts: NDArray[np.float64]
    adds: NDArray[np.bool_]  # it adds, or multiplies
    weights: NDArray[np.float32]  # (N, 4, 2): of the image and of its partner

    @classmethod
    def make(
        cls, rng: np.random.Generator, count: int, augmentation: Augmentation, operations: int, epoch: int
    ) -> _Draws:
        """Draw for `count` images."""
        steps = (count, augmentation.operations)
        mixings = count if augmentation.pixmix else 0  # an image's own, of which most trainings need none
        mixings_each = (mixings, _MOST_MIXINGS)
        return cls(
            shifts=rng.integers(0, 2 * CROP_PADDING + 1, (count, 2)),
            flips=flipped(np.arange(count), epoch),
            operations=rng.integers(operations, size=steps),
            erased=rng.random(count) < augmentation.erasing,
            rectangle=rng.random((count, 4)),
            pixmixed=rng.random(count) < augmentation.pixmix,
            mixing_operations=rng.integers(operations, size=steps),
            starts_varied=rng.random(count) < 0.5,
            mixings=rng.integers(_MOST_MIXINGS + 1, size=count),
            with_fractal=rng.random(mixings_each) < 0.5,
            fractals=rng.integers(_FRACTALS, size=mixings_each),
            fractal_shifts=rng.random((*mixings_each, 2)),
            adds=rng.random(mixings_each) < 0.5,
            weights=_mixing_weights(rng, mixings_each),
        )

    def of(self, indices: NDArray[np.intp]) -> _Draws:
        """Return the draws of the images at `indices`."""
        return _Draws(**{name: values[indices] if len(values) else values for name, values in vars(self).items()})


def randaugment_operations(
    magnitude: int, shape: tuple[int, int], fill: list[float], *, bilinear: bool = False
) -> list[Operation]:
    """Return RandAugment's operations of strength `magnitude` for uint8 images (N, 3, *shape), all equally likely.

    One with a direction stands there once for each; one without, twice. Source: Cubuk et al. 2019,
    https://arxiv.org/abs/1909.13719, as torchvision draws it.
    """
    mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.NEAREST
    space = RandAugment()._augmentation_space(_BINS, shape)  # noqa: SLF001 - the strengths, nowhere public
    return [
        _operation(name, sign * float(values[magnitude]) if values.ndim else 0.0, fill, mode)
        for name, (values, signed) in space.items()
        for sign in ((1, -1) if signed else (1, 1))
    ]


def _operation(name: str, value: float, fill: list[float], mode: InterpolationMode) -> Operation:
    slant, shift = degrees(atan(value)), int(value)
    affine = partial(F.affine, interpolation=mode, fill=fill)
    operations: dict[str, Operation] = {
        "Identity": lambda images: images,
        "ShearX": lambda images: affine(images, 0.0, [0, 0], 1.0, [slant, 0.0], center=[0.0, 0.0]),
        "ShearY": lambda images: affine(images, 0.0, [0, 0], 1.0, [0.0, slant], center=[0.0, 0.0]),
        "TranslateX": lambda images: affine(images, 0.0, [shift, 0], 1.0, [0.0, 0.0]),
        "TranslateY": lambda images: affine(images, 0.0, [0, shift], 1.0, [0.0, 0.0]),
        "Rotate": lambda images: F.rotate(images, value, mode, fill=fill),
        "Brightness": lambda images: F.adjust_brightness(images, 1 + value),
        "Color": lambda images: F.adjust_saturation(images, 1 + value),
        "Contrast": lambda images: F.adjust_contrast(images, 1 + value),
        "Sharpness": lambda images: F.adjust_sharpness(images, 1 + value),
        "Posterize": lambda images: F.posterize(images, int(value)),
        "Solarize": lambda images: F.solarize(images, value),
        "AutoContrast": F.autocontrast,
        "Equalize": F.equalize,
    }
    return operations[name]


def _mirrored(length: int, shifts: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return for each of `shifts` which of `length` pixels stand in a cut-out of the mirrored image: (N, length)."""
    places: NDArray[np.intp] = np.abs(np.arange(length) + shifts[:, None])
    return length - 1 - np.abs(length - 1 - places)


def _rectangles(drawn: _Draws, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Return a mask (N, H, W) of what random erasing erases: 2 to 25 % of an image, up to 3.3 times as long as wide."""
    area = shape[0] * shape[1] * (0.02 + 0.23 * drawn.rectangle[:, 0])
    aspect = 3.3 ** (2 * drawn.rectangle[:, 1] - 1)
    rows = _span(shape[0], np.sqrt(area * aspect), drawn.rectangle[:, 2])
    columns = _span(shape[1], np.sqrt(area / aspect), drawn.rectangle[:, 3])
    return drawn.erased[:, None, None] & rows[:, :, None] & columns[:, None, :]


def _span(length: int, side: NDArray[np.float64], place: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return a mask (N, length) of `side` pixels each, from `place` on: 0 is the first possible, 1 after the last."""
    side = np.minimum(side.round(), length)
    start = np.floor(place * (length - side + 1))[:, None]
    pixels = np.arange(length)
    return (start <= pixels) & (pixels < start + side[:, None])


def _mixing_weights(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return what the image and its partner weigh in a mixing: shares, or the partner is taken away."""
    is_taken_away = rng.random(shape) < 0.5
    # The inverse distribution functions of Beta(β, 1), and twice of Beta(1, β).
    near_one, near_zero, beyond = rng.random((3, *shape)) ** (1 / _MIXING_STRENGTH)
    near_zero, beyond = 1 - near_zero, 1 - beyond
    own = np.where(is_taken_away, 1 + beyond, near_one)
    return np.stack([own, np.where(is_taken_away, -near_zero, near_zero)], axis=-1).astype(np.float32)
