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
from torchvision.transforms.v2 import CutMix  # isort: skip

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
    message. All randomness comes from (seed, epoch, index): a picture is the same whichever worker or process makes it,
    and in a resumed training too. Only what CutMix joins are the pictures that one process has of a batch.
    """

    def __init__(self, images: Images, size: Input, augmentation: Augmentation, seed: int) -> None:
        self.images = images
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        grey = [round(255 * mean) for mean in size.mean]
        self._randaugment = _QuickRandAugment(augmentation.operations, augmentation.magnitude, fill=grey)
        self._erase = RandomErasing(augmentation.erasing, scale=(0.02, 0.25), value=0)
        self._cutmix = CutMix(num_classes=len(images.classes))

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One augmented, normalised picture (3, H, W) and its label."""
        images, labels = self.__getitems__([item])
        return images[0], labels[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """An augmented batch: pictures (N, 3, H, W) float32, normalised, and labels (N,) int64.

        Where the batch is mixed, its labels are (N, classes) float32, the share of each class.
        """
        epoch = items[0][0]
        indices = np.array([index for _, index in items])
        flips = (indices * _HASH_MULTIPLIER >> 16) % 2 == epoch % 2
        seeds = [_seeds(self.seed, epoch, int(index)) for index in indices]
        with torch.random.fork_rng(devices=[]):
            padded = _padded(self.images.images[indices])
            pixels = [self._vary(*picture) for picture in zip(padded, flips, seeds, strict=True)]
            images = torch.from_numpy(normalise(np.stack(pixels), self.size))
            if self.augmentation.erasing:
                images = torch.stack([self._erased(*picture) for picture in zip(images, seeds, strict=True)])
            labels = torch.from_numpy(self.images.labels[indices])
            if self._is_mixed(seeds[0]):
                images, labels = self._cutmix(images, labels)
        return images, labels

    def _is_mixed(self, seeds: tuple[int, int]) -> bool:
        """Whether the batch that begins with the picture of these seeds is; how follows from the second seed."""
        if not self.augmentation.cutmix:
            return False
        torch.default_generator.manual_seed(seeds[1])
        return float(torch.rand(())) < self.augmentation.cutmix

    def _vary(self, padded: NDArray[np.uint8], is_flipped: bool, seeds: tuple[int, int]) -> NDArray[np.uint8]:  # noqa: FBT001
        """A cut-out (H, W, 3) of the padded picture, flipped or not, after RandAugment."""
        torch.default_generator.manual_seed(seeds[0])
        down, right = torch.randint(0, 2 * _CROP_PADDING + 1, (2,)).tolist()
        height, width = (side - 2 * _CROP_PADDING for side in padded.shape[:2])
        image = padded[down : down + height, right : right + width]
        if is_flipped:
            image = image[:, ::-1]
        if not self.augmentation.operations:
            return image
        return np.asarray(self._randaugment(Image.fromarray(np.ascontiguousarray(image))))

    def _erased(self, image: torch.Tensor, seeds: tuple[int, int]) -> torch.Tensor:
        torch.default_generator.manual_seed(seeds[1])
        return self._erase(image)  # type: ignore[no-any-return]


class _QuickRandAugment(RandAugment):  # type: ignore[misc]
    """torchvision's, less the table of all operations that it makes anew for each picture: half of its time."""

    _space: dict[str, Any] | None = None

    def _augmentation_space(self, num_bins: int, image_size: tuple[int, int]) -> dict[str, Any]:
        # The pictures of one training are of one size.
        if self._space is None:
            self._space = super()._augmentation_space(num_bins, image_size)
        return self._space


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index), their order drawn from (seed, epoch) alone.

    An incomplete last batch is dropped. Of each batch, process `rank` of `processes` gets its equal part.
    """

    def __init__(self, size: int, batch_size: int, seed: int, *, rank: int = 0, processes: int = 1) -> None:
        self.size = size
        self.batch_size = min(batch_size, size // processes * processes)
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches, or this process's parts of them, of the epoch that `epoch` is set to."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.processes]]


def training_loader(
    images: Images,
    size: Input,
    augmentation: Augmentation,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    rank: int = 0,
    processes: int = 1,
) -> tuple[DataLoader[tuple[torch.Tensor, torch.Tensor]], EpochBatches]:
    """A loader of batches (N, 3, H, W) float32 with their labels, and its sampler, whose `epoch` the loop sets.

    `batch_size` counts the pictures of all `processes`; the loader yields the part of process `rank`.
    """
    batches = EpochBatches(len(images), batch_size, seed, rank=rank, processes=processes)
    loader = DataLoader(
        AugmentedImages(images, size, augmentation, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator(),  # or the loader draws its workers' seeds from the global state
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return loader, batches


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - the loader's own signature
    return batch


def _seeds(*entropy: int) -> tuple[int, int]:
    first, second = np.random.SeedSequence(entropy).generate_state(2)
    return int(first), int(second)


def _padded(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pictures (N, H, W, 3) with their borders mirrored outwards."""
    around = (_CROP_PADDING, _CROP_PADDING)
    return np.pad(images, ((0, 0), around, around, (0, 0)), mode="reflect")
