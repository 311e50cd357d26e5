"""A user's own images: one folder a class, as torchvision's ImageFolder lays them out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from contracts.model import Input
from handlers.errors import RequestError
from handlers.preprocess import decode_for_network, decode_image, prepare
from training.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SMALLEST, LARGEST = 32, 224  # ResNet-18's last feature map is 1 pixel wide at 32, and ImageNet's size is 224


@dataclass(frozen=True)
class ImageFolder:
    """The readable images below `path`; classes are the folders' names, sorted.

    Attributes:
        files: each with its label.
        sides: each file's shorter side in pixels.
    """

    path: Path
    classes: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]
    sides: tuple[int, ...]

    @classmethod
    def find(cls, path: Path, part: str) -> ImageFolder:
        """The images in PATH/`part`, or in PATH itself where it is not parted; files that are none are named.

        Hidden files and folders are not looked at.

        Raises:
            DataError: there are not at least two class folders with images in each, most files are no images, or
                PATH has a part to train on and not `part`.
        """
        if is_part(path / part):
            path = path / part
        elif is_part(path / "train"):
            raise DataError(f"{path} has a folder train, but no folder {part} with a folder of images for each class")
        if not path.is_dir():
            raise DataError(f"{path} is no folder: pass one that holds a folder of images for each class")
        folders = _folders(path)
        if parts := [entry.name for entry in folders if entry.name.lower() in PARTS and is_part(entry)]:
            raise DataError(
                f"{path} holds {', '.join(parts)} with folders in it, which is no class: the images to learn from "
                "belong into train, a folder a class, those to measure on into test"
            )
        files = [
            (file, label)
            for label, folder in enumerate(folders)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not any(name.startswith(".") for name in file.relative_to(folder).parts)
        ]
        sides = _sides(path, [file for file, _ in files])
        files = [(file, label) for file, label in files if file in sides]
        empty = [folder.name for label, folder in enumerate(folders) if label not in {label for _, label in files}]
        if len(folders) < 2 or empty:
            found = f"; there is no image in {', '.join(empty)}" if empty else ""
            raise DataError(f"{path} needs at least two folders, one a class, each with images in it{found}")
        return cls(path, tuple(folder.name for folder in folders), tuple(files), tuple(sides.values()))

    def choose_size(self) -> Input:
        """The size for a network: the median of the shorter sides, from 32 to 224 in steps of 8; not normalised yet."""
        side = int(np.clip(np.median(self.sides) // 8 * 8, SMALLEST, LARGEST))
        return Input(side, side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def read(self, size: Input) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images (N, H, W, 3), decoded as serving does it, and their labels (N,)."""
        images = [
            prepare(decode_for_network(file.read_bytes(), size).image, size)
            for file, _ in tqdm(self.files, desc=f"reading {self.path.name}", unit="file", leave=False)
        ]
        return np.stack(images), np.array([label for _, label in self.files], np.int64)


def normalised_by(images: NDArray[np.uint8], size: Input) -> Input:
    """`size` with the mean and standard deviation per channel of `images` (N, H, W, 3)."""
    # By how often each value occurs: as floats, thousands of images would take tens of gigabytes.
    counts = np.zeros((3, 256), np.int64)
    for image in images:
        for channel in range(3):
            counts[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
    values, pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / pixels
    std = np.sqrt(np.maximum(counts @ values**2 / pixels - mean**2, 0))
    red, green, blue = (round(float(value), 4) for value in mean)
    spread = tuple(max(round(float(value), 4), 1e-3) for value in std)
    return replace(size, mean=(red, green, blue), std=(spread[0], spread[1], spread[2]))


def is_part(path: Path) -> bool:
    """Return True if this folder is a part of a data set (it holds folders), not a class of that name."""
    return path.is_dir() and bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _sides(path: Path, files: list[Path]) -> dict[Path, int]:
    """The shorter sides of those files that are whole images; the others are named in the log."""
    sides = {}
    for file in tqdm(files, desc=f"checking {path.name}", unit="file", leave=False):
        try:
            sides[file] = min(decode_image(file.read_bytes(), at_least=(1, 1)).size)
        except RequestError as error:
            # What follows the colon is advice for those who send images.
            logger.warning("skipped %s: %s", file, error.detail.partition(":")[0])
        except OSError as error:
            logger.warning("skipped %s: %s", file, error.strerror)
    bad = [file for file in files if file not in sides]
    if 2 * len(bad) > len(files):
        raise DataError(f"{len(bad)} of {len(files)} files in {path} are no images, {bad[0]} for one")
    return sides
