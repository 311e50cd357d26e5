"""Feeds a training with augmented pictures, the same ones in a resumed run as in an unbroken one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from handlers import network  # noqa: F401 - makes torchvision importable beside a CPU-only torch
from handlers.preprocess import normalise

# After handlers.network, which declares what torchvision's import needs.
from torchvision.transforms import RandAugment, RandomErasing  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from handlers.contract import Input
    from training.data import Images
    from training.recipe import Augmentation

_HASH_MULTIPLIER = 2654435761  # spreads neighbouring indices; Knuth, The Art of Computer Programming 3, section 6.4
_CROP_PADDING = 4  # He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385


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
    """Shuffled batches of (epoch, index), their order drawn from (seed, epoch) alone.

    An incomplete last batch is dropped.
    """

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
    """A loader of batches (N, 3, H, W) float32 with labels (N,), and its sampler, whose `epoch` the loop sets."""
    batches = EpochBatches(len(images), batch_size, seed)
    loader = DataLoader(
        AugmentedImages(images, size, augmentation, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator(),  # or the loader draws its workers' seeds from the global state
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )
    return loader, batches


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - the loader's own signature
    return batch


def _shift(images: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Each picture of (N, H, W, 3) moved by up to the padding in both directions, its borders mirrored."""
    count, height, width, _ = images.shape
    padding = _CROP_PADDING
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))  # (N, 9, 9, 3, H, W)
    down, right = random.integers(0, 2 * padding + 1, (2, count))
    return np.ascontiguousarray(windows[np.arange(count), down, right].transpose(0, 2, 3, 1))
