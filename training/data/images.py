"""Labelled images in memory, and the stratified split of them."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

from contracts.model import Input
from training.data.folder import ImageFolder, is_part, normalised_by
from training.data.sources import content_sha256, load_cifar10
from training.errors import DataError
from training.recipe import data_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Per channel, of CIFAR-10's 50,000 training images scaled to 0..1; the test of the data recomputes them.
CIFAR10_INPUT = Input(32, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Images:
    """Labelled images in memory: `images` (N, H, W, 3) uint8, `labels` (N,) int64, `classes` by label."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def pick(self, indices: NDArray[np.intp]) -> Images:
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def sample(self, count: int) -> Images:
        """At most `count` of the images, always the same ones."""
        return self.pick(self.sample_indices(count))

    def sample_indices(self, count: int) -> NDArray[np.intp]:
        """Return the indices of what `sample` takes."""
        indices: NDArray[np.intp] = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        return indices

    def sha256(self) -> str:
        """The hash of the pixels as uint8 (N, H, W, 3) bytes followed by the labels as uint8 bytes."""
        return content_sha256(self.images, self.labels.astype(np.uint8))


def load_training_images(data: str, cache: Path) -> tuple[Images, Input]:
    """The images to learn from that `data` names, and how the network takes them.

    Args:
        data: `cifar10`, `cifar10:PATH` of its archive or folder, or `imagefolder:PATH` with one folder a class (in
            PATH/train where there is one).
        cache: where what was fetched is kept.

    Raises:
        DataError: the name is unknown, or the data cannot be had; the message says what to do.
    """
    kind, path = data_kind(data)
    if kind == "imagefolder":
        folder = ImageFolder.find(Path(path), "train")
        size = folder.choose_size()
        images = _from_folder(folder, size)
        return images, normalised_by(images.images, size)
    return _from_cifar10(cache, path, "train"), CIFAR10_INPUT


def load_test_images(data: str, cache: Path, size: Input) -> Images:
    """The images to report on: CIFAR-10's test part, or a folder's (PATH/test where there is one), at `size`.

    Raises:
        DataError: as `load_training_images`.
    """
    kind, path = data_kind(data)
    if kind == "imagefolder":
        return _from_folder(ImageFolder.find(Path(path), "test"), size)
    return _from_cifar10(cache, path, "test")


def has_test_part(data: str) -> bool:
    """Return True if `data` has test images beside its training images."""
    kind, path = data_kind(data)
    return kind == "cifar10" or is_part(Path(path) / "test")


def _from_cifar10(cache: Path, path: str, part: str) -> Images:
    split = load_cifar10(cache, Path(path) if path else None)[part]
    return Images(split.images, split.labels.astype(np.int64), CIFAR10_CLASSES)


def _from_folder(folder: ImageFolder, size: Input) -> Images:
    images, labels = folder.read(size)
    return Images(images, labels, folder.classes)


def stratified_split(
    labels: NDArray[np.int64], validation: float | int, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices (training, validation), each class in the same share; the same `seed` gives the same split.

    Args:
        labels: (N,) integers.
        validation: share held out, between 0 and 1; or how many.
        seed: of the shuffle.

    Raises:
        DataError: a class has too few images to stand on both sides.
    """
    try:
        training, held_out = train_test_split(
            np.arange(len(labels)), test_size=validation, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(f"the data cannot be split with {validation} held out: {error}") from error
    return np.sort(training), np.sort(held_out)


def stratified_subset(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.intp]:
    """Indices of `size` images with the classes in their shares; all of them when there are no more."""
    if size >= len(labels):
        return np.arange(len(labels))
    most = len(labels) - len(np.unique(labels))
    if size > most:
        raise DataError(f"a subset of {size} leaves out less than an image of each class: take {most}, or all")
    return stratified_split(labels, size, seed)[1]


def divide(images: Images, *, subset: int, validation: float, seed: int) -> tuple[Images, Images]:
    """The images a training learns from, and those it holds out, which decide all about its model.

    Args:
        images: all training images.
        subset: how many of them to use; 0 uses all.
        validation: share of these that is held out.
        seed: the same one always divides them alike.

    Raises:
        DataError: a class has too few images to stand on both sides.
    """
    if subset:
        images = images.pick(stratified_subset(images.labels, subset, seed))
    learnt, held_out = stratified_split(images.labels, validation, seed)
    for what, labels in (("learn from", images.labels[learnt]), ("hold out", images.labels[held_out])):
        if missing := [name for label, name in enumerate(images.classes) if label not in labels]:
            raise DataError(
                f"there is no image of {', '.join(missing)} to {what} (of {len(labels)}): "
                "add some, or change --validation or --subset"
            )
    return images.pick(learnt), images.pick(held_out)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the image, (H, W, 3) or grey (H, W), as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
