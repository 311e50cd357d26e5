"""Labelled images in memory, and the stratified split of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.model_selection import train_test_split

from handlers.contract import Input
from training.errors import DataError
from training.sources import content_sha256, load_cifar10

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Per channel, of CIFAR-10's 50,000 training images scaled to 0..1; the test of the data recomputes them.
CIFAR10_INPUT = Input(32, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Images:
    """Labelled pictures in memory: `images` (N, H, W, 3) uint8, `labels` (N,) int64, `classes` by label."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.labels)

    def pick(self, indices: NDArray[np.intp]) -> Images:
        """The pictures at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def sha256(self) -> str:
        """The hash of the pixels as uint8 (N, H, W, 3) bytes followed by the labels as uint8 bytes."""
        return content_sha256(self.images, self.labels.astype(np.uint8))


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


def stratified_split(
    labels: NDArray[np.int64], validation: float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
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


def stratified_subset(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.intp]:
    """Indices of `size` pictures with the classes in their shares; all of them when there are no more."""
    if size >= len(labels):
        return np.arange(len(labels))
    return stratified_split(labels, size / len(labels), seed)[1]
