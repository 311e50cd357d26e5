"""The images of one training, divided, and the loader of their augmented batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader

from training.data.augment import EpochBatches, training_loader
from training.data.device_augment import DeviceLoader
from training.data.images import divide, load_training_images

if TYPE_CHECKING:
    from pathlib import Path

    from contracts.model import Input
    from training.data.images import Images
    from training.parallel import ProcessGroup
    from training.recipe import Augmentation, Recipe

Loader = DataLoader[tuple[Tensor, Tensor]] | DeviceLoader


@dataclass(frozen=True)
class TrainingData:
    """The images that a training learns from and those that it holds out; `sha256` is that of both together."""

    training: Images
    held_out: Images
    input: Input
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.training.classes


def load_training_data(recipe: Recipe, cache: Path) -> TrainingData:
    """Return the recipe's images, divided as it says.

    Raises:
        DataError: the data cannot be loaded or divided.
    """
    images, size = load_training_images(recipe.data, cache)
    training, held_out = divide(images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed)
    return TrainingData(training, held_out, size, images.sha256())


def make_loader(
    data: TrainingData, augmentation: Augmentation, recipe: Recipe, group: ProcessGroup
) -> tuple[Loader, EpochBatches]:
    """Return the loader of augmented batches and the order of the images, whose `epoch` the loop sets.

    A GPU augments the images in its own memory. So does a processor with PixMix or several views of an image, which
    only that loader knows.
    """
    if group.device.type == "cuda" or augmentation.pixmix or recipe.views > 1:
        batches = EpochBatches(
            len(data.training), recipe.batch_size, recipe.seed, rank=group.rank, processes=group.processes
        )
        loader = DeviceLoader(
            data.training,
            data.input,
            augmentation,
            batches,
            seed=recipe.seed,
            device=group.device,
            views=recipe.views,
        )
        return loader, batches
    return training_loader(
        data.training,
        data.input,
        augmentation,
        batch_size=recipe.batch_size,
        workers=recipe.workers,
        seed=recipe.seed,
        rank=group.rank,
        processes=group.processes,
    )
