"""Write scikit-learn's handwritten digits as a folder of images, for the tutorial: `tutorial_images.py FOLDER`.

FOLDER/train and FOLDER/test get one folder for each digit, and every sixth image is a test image. The 1,797 images come
with scikit-learn (https://archive.ics.uci.edu/dataset/80); nothing is fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32


def main(folder: Path) -> None:
    """Write the images, enlarged from 8 to 32 pixels."""
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the values are 0 to 16
    for number, (image, label) in enumerate(zip(grey, digits.target, strict=True)):
        part = folder / ("test" if number % 6 == 0 else "train") / NAMES[label]
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(part / f"{number}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
