"""Images in memory, the stratified split, augmentation and the loaders that feed a training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, Sampler

from handlers import network  # noqa: F401 - makes torchvision importable beside a CPU-only torch
from handlers.contract import Input
from handlers.preprocess import normalise
from training.sources import DataError, load_cifar10

# After handlers.network, which declares what torchvision's import needs.
from torchvision.transforms import RandAugment, RandomErasing  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator

# Per channel, of CIFAR-10's 50,000 training images scaled to 0..1; the test of the data recomputes them.
CIFAR10_INPUT = Input(32, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_HASH_MULTIPLIER = 2654435761  # spreads neighbouring indices; Knuth, The Art of Computer Programming 3, section 6.4
_CROP_PADDING = 4  # He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385


@dataclass(frozen=True)
class Images:
    """Labelled pictures in memory: `images` (N, H, W, 3) uint8, `labels` (N,) int64, `classes` by label."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.labels)

    def pick(self, indices: np.ndarray) -> Images:
        """The pictures at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


def load_images(data: str, cache: Path) -> dict[str, Images]:
    """The `train` and `test` pictures that `data` names: `cifar10` or `cifar10:/path/to/its/archive/or/folder`.

    Raises:
        DataError: the name is unknown, or the data cannot be had; the message says what to do.
    """
    kind, _, path = data.partition(":")
    if kind != "cifar10":
        raise DataError(f"unknown data {data!r}: use cifar10 or cifar10:/path/to/cifar-10-binary.tar.gz")
    splits = load_cifar10(cache, Path(path) if path else None)
    return {
        name: Images(split.images, split.labels.astype(np.int64), CIFAR10_CLASSES) for name, split in splits.items()
    }


def stratified_split(labels: np.ndarray, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (training, validation), each class in the same share; the same `seed` gives the same split.

    Args:
        labels: (N,) integers.
        validation: share held out, between 0 and 1.
        seed: of the shuffle.

    Raises:
        DataError: a class has too few pictures to stand on both sides.
    """
    try:
        training, held_out = train_test_split(
            np.arange(len(labels)), test_size=validation, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(f"the data cannot be split with {validation:.0%} held out: {error}") from error
    return np.sort(training), np.sort(held_out)


def stratified_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Indices of `size` pictures with the classes in their shares; all of them when there are no more."""
    if size >= len(labels):
        return np.arange(len(labels))
    return stratified_split(labels, size / len(labels), seed)[1]


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied.

    Every picture is shifted by up to 4 pixels with mirrored borders, and flipped in every second epoch, which of the two
    by its index: no picture is seen unflipped twice in a row (Jordan 2024, https://arxiv.org/abs/2404.00498). RandAugment
    with `operations` operations of strength `magnitude` (0..30) follows (Cubuk et al. 2019,
    https://arxiv.org/abs/1909.13719), then random erasing with probability `erasing` (Zhong et al. 2017,
    https://arxiv.org/abs/1708.04896).
    """

    operations: int = 2
    magnitude: int = 9
    erasing: float = 0.0


class AugmentedImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Training pictures, augmented a batch at a time.

    An item is asked for as (epoch, index): the epoch travels with the index, so that persistent loader workers need no
    message. All randomness comes from (seed, epoch, first index of the batch): the same batch is the same whichever
    worker makes it, and in a resumed training too.
    """

    def __init__(self, images: Images, size: Input, augmentation: Augmentation, seed: int) -> None:
        self.images = images
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        grey = [round(255 * mean) for mean in size.mean]
        self._randaugment = RandAugment(augmentation.operations, augmentation.magnitude, fill=grey)
        self._erase = RandomErasing(augmentation.erasing, scale=(0.02, 0.25), value=0)

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One augmented, normalised picture (3, H, W) and its label."""
        images, labels = self.__getitems__([item])
        return images[0], labels[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """An augmented batch: pictures (N, 3, H, W) float32, normalised, and labels (N,) int64."""
        epoch = items[0][0]
        indices = np.array([index for _, index in items])
        entropy = np.random.SeedSequence([self.seed, epoch, int(indices[0])])
        flips = (indices * _HASH_MULTIPLIER >> 16) % 2 == epoch % 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            shifted = _shift(self.images.images[indices], np.random.default_rng(entropy))
            shifted[flips] = shifted[flips, :, ::-1]
            if self.augmentation.operations:
                shifted = np.stack([np.asarray(self._randaugment(Image.fromarray(image))) for image in shifted])
            images = torch.from_numpy(normalise(shifted, self.size))
            if self.augmentation.erasing:
                images = torch.stack([self._erase(image) for image in images])
        return images, torch.from_numpy(self.images.labels[indices])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index), the order drawn from (seed, epoch) alone; an incomplete last batch is dropped."""

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches of the epoch that `epoch` is set to."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


def training_loader(
    images: Images, size: Input, augmentation: Augmentation, *, batch_size: int, workers: int, seed: int
) -> tuple[DataLoader[tuple[torch.Tensor, torch.Tensor]], EpochBatches]:
    """A loader of augmented batches (N, 3, H, W) float32 and labels (N,), and the sampler whose `epoch` the loop sets."""
    batches = EpochBatches(len(images), batch_size, seed)
    loader = DataLoader(
        AugmentedImages(images, size, augmentation, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )
    return loader, batches


def _as_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch


def _shift(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each picture of (N, H, W, 3) moved by up to the padding in both directions, its borders mirrored."""
    count, height, width, _ = images.shape
    padding = _CROP_PADDING
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))  # (N, 9, 9, 3, H, W)
    down, right = random.integers(0, 2 * padding + 1, (2, count))
    return np.ascontiguousarray(windows[np.arange(count), down, right].transpose(0, 2, 3, 1))
