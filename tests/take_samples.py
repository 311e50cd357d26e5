"""Writes tests/samples/: the first ten test images of each of CIFAR-10's classes, in the test split's order.

Run it again only if the folder is lost: python tests/take_samples.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from training.data.images import CIFAR10_INPUT, load_test_images

SAMPLES = Path(__file__).parent / "samples"
PER_CLASS = 10


def main() -> None:
    """Writes samples/<class>/<number>.png."""
    images = load_test_images("cifar10", Path.home() / ".cache" / "gradserve", CIFAR10_INPUT)
    for label, name in enumerate(images.classes):
        folder = SAMPLES / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(np.flatnonzero(images.labels == label)[:PER_CLASS]):
            Image.fromarray(images.images[index]).save(folder / f"{number}.png", optimize=True)


if __name__ == "__main__":
    main()
