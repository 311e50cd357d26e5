"""Feeds a training with augmented images, the same ones in a resumed run as in an unbroken one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from handlers import network  # noqa: F401 - makes torchvision importable beside a CPU-only torch
from handlers.preprocess import normalise

# After handlers.network, which makes torchvision importable beside a CPU-only torch.
from torchvision.transforms import InterpolationMode, RandAugment, RandomErasing  # isort: skip
from torchvision.transforms.v2 import CutMix  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from contracts.model import Input
    from training.data.images import Images
    from training.recipe import Augmentation

_HASH_MULTIPLIER = 2654435761  # spreads neighbouring indices; Knuth, The Art of Computer Programming 3, section 6.4
CROP_PADDING = 4  # He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385


class AugmentedImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Training images, augmented a batch at a time.

    An item is asked for as (epoch, index): the epoch travels with the index, so that persistent loader workers need no
    message. All randomness comes from (seed, epoch, index): an image is the same whichever worker or process makes it,
    and in a resumed training too. Only what CutMix joins are the images that one process has of a batch.
    """

    def __init__(self, images: Images, size: Input, augmentation: Augmentation, seed: int) -> None:
        self.images = images
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        grey = [round(255 * mean) for mean in size.mean]
        interpolation = InterpolationMode.BILINEAR if augmentation.bilinear else InterpolationMode.NEAREST
        self._randaugment = RandAugment(
            augmentation.operations, augmentation.magnitude, interpolation=interpolation, fill=grey
        )
        self._erase = RandomErasing(1.0, scale=(0.02, 0.25), value=0)
        self._cutmix = CutMix(num_classes=len(images.classes))
        self._epoch = -1

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One augmented, normalised image (3, H, W) and its label."""
        images, labels = self.__getitems__([item])
        return images[0], labels[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """An augmented batch: images (N, 3, H, W) float32, normalised, and labels (N,) int64.

        Where the batch is mixed, its labels are (N, classes) float32, the share of each class.
        """
        epoch = items[0][0]
        indices = np.array([index for _, index in items])
        flips = flipped(indices, epoch)
        seeds = self._seeds(epoch)[indices]
        erased, mixed = seeds[:, 1] < np.array([[self.augmentation.erasing], [self.augmentation.cutmix]]) * 2**32
        with torch.random.fork_rng(devices=[]):
            pixels = self._varied(self.images.images[indices], flips, seeds[:, 0])
            images = torch.from_numpy(normalise(pixels, self.size))
            for place in np.flatnonzero(erased).tolist():
                torch.default_generator.manual_seed(int(seeds[place, 1]))
                images[place] = self._erase(images[place])
            labels = torch.from_numpy(self.images.labels[indices])
            if mixed[0]:
                torch.default_generator.manual_seed(int(seeds[0, 1]))
                images, labels = self._cutmix(images, labels)
        return images, labels

    def _seeds(self, epoch: int) -> NDArray[np.unsignedinteger]:
        """Two numbers below 2³² for each image: the first seeds its variation, the second erasing and mixing."""
        if self._epoch != epoch:
            self._epoch = epoch
            self._epoch_seeds = np.random.SeedSequence((self.seed, epoch)).generate_state(2 * len(self)).reshape(-1, 2)
        return self._epoch_seeds

    def _varied(
        self, pixels: NDArray[np.uint8], flips: NDArray[np.bool_], seeds: NDArray[np.unsignedinteger]
    ) -> NDArray[np.uint8]:
        """Return cut-outs (N, H, W, 3) of the padded images, flipped or not, after RandAugment."""
        _, height, width, _ = pixels.shape
        varied = np.empty_like(pixels)
        for place, (padded, is_flipped, seed) in enumerate(zip(_padded(pixels), flips, seeds.tolist(), strict=True)):
            torch.default_generator.manual_seed(seed)
            down, right = torch.randint(0, 2 * CROP_PADDING + 1, (2,)).tolist()
            cut = padded[down : down + height, right : right + width]
            image = Image.fromarray(np.ascontiguousarray(cut[:, ::-1] if is_flipped else cut))
            varied[place] = self._randaugment(image)
        return varied


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
        for batch in self.indices():
            yield [(self.epoch, index) for index in batch.tolist()]

    def indices(self) -> Iterator[NDArray[np.intp]]:
        """Yield the images' places of each batch, or of this process's part of it."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.processes]


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

    `batch_size` counts the images of all `processes`; the loader yields the part of process `rank`.
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


def flipped(indices: NDArray[np.intp], epoch: int) -> NDArray[np.bool_]:
    """Return for each image of `indices` whether it is flipped in `epoch`: in every second one."""
    flips: NDArray[np.bool_] = (indices * _HASH_MULTIPLIER >> 16) % 2 == epoch % 2
    return flips


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - the loader's own signature
    return batch


def _padded(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images (N, H, W, 3) with their borders mirrored outwards."""
    around = (CROP_PADDING, CROP_PADDING)
    return np.pad(images, ((0, 0), around, around, (0, 0)), mode="reflect")
