"""A user's own pictures: one folder a class, as torchvision's ImageFolder lays them out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from handlers.contract import Input
from handlers.errors import RequestError
from handlers.preprocess import decode_for_network, decode_image, prepare
from training.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SMALLEST, LARGEST = 32, 224  # ResNet-18's last feature map is 1 pixel wide at 32, and ImageNet's size is 224


@dataclass(frozen=True)
class ImageFolder:
    """The picture files below `path` by class; classes are the folders' names, sorted."""

    path: Path
    classes: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]

    @classmethod
    def find(cls, path: Path, part: str) -> ImageFolder:
        """The pictures in PATH/`part`, or in PATH itself where there is no such folder.

        Raises:
            DataError: there are not at least two class folders with files in them.
        """
        path = path / part if (path / part).is_dir() else path
        if not path.is_dir():
            raise DataError(f"{path} is no folder: pass one that holds a folder of pictures for each class")
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = tuple(
            (file, label)
            for label, folder in enumerate(folders)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.name.startswith(".")
        )
        if len(folders) < 2 or len({label for _, label in files}) < len(folders):
            raise DataError(f"{path} needs at least two folders, one a class, each with pictures in it")
        return cls(path, tuple(folder.name for folder in folders), files)

    def measure(self) -> Input:
        """The size for a network, and the pictures' mean and standard deviation per channel at that size.

        The size is the median of the pictures' shorter sides, between 32 and 224 pixels, in whole multiples of 8.
        """
        sides = [min(decode_image(file.read_bytes(), at_least=(1, 1)).size) for file, _ in self._readable()]
        side = int(np.clip(np.median(sides) // 8 * 8, SMALLEST, LARGEST))
        plain = Input(side, side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        pixels = self.read(plain)[0].reshape(-1, 3).astype(np.float32) / 255
        mean, std = pixels.mean(axis=0, dtype=np.float64), pixels.std(axis=0, dtype=np.float64)
        red, green, blue = (round(float(value), 4) for value in mean)
        spread = tuple(max(round(float(value), 4), 1e-3) for value in std)
        return Input(side, side, (red, green, blue), (spread[0], spread[1], spread[2]))

    def read(self, size: Input) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The readable pictures (N, H, W, 3), decoded as serving does it, and their labels (N,)."""
        images, labels = [], []
        for file, label in self._readable():
            images.append(prepare(decode_for_network(file.read_bytes(), size).image, size))
            labels.append(label)
        return np.stack(images), np.array(labels, np.int64)

    def _readable(self) -> Iterator[tuple[Path, int]]:
        bad = []
        for file, label in tqdm(self.files, desc=f"reading {self.path.name}", unit="file", leave=False):
            try:
                decode_image(file.read_bytes(), at_least=(1, 1))
            except RequestError as error:
                bad.append(file)
                logger.warning("skipped %s: %s", file, error)
                continue
            yield file, label
        if 2 * len(bad) > len(self.files):
            raise DataError(f"{len(bad)} of {len(self.files)} files in {self.path} are no pictures, {bad[0]} for one")
