"""Draws docs/answers.png from a running gateway: images, answers, heatmaps.

python docs/make_picture.py http://127.0.0.1:8000
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import httpx
from matplotlib.figure import Figure
from PIL import Image

SAMPLES = Path(__file__).parents[1] / "tests" / "samples"
CLASSES = ("cat", "dog", "bird", "horse", "ship", "truck")
SIDE = 256


def main(address: str) -> None:
    """Asks for the first sample of each class and writes the image beside this file."""
    figure = Figure(figsize=(2 * len(CLASSES), 4.2), layout="constrained")
    rows = figure.subplots(2, len(CLASSES))
    with httpx.Client(base_url=address, timeout=30) as client:
        for column, name in enumerate(CLASSES):
            data = (SAMPLES / name / "0.png").read_bytes()
            answer = client.post("/predict", files={"file": data}).raise_for_status().json()
            overlay = client.post("/explain", params={"size": SIDE}, content=data).raise_for_status().content
            image = Image.open(io.BytesIO(data)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            rows[0, column].imshow(image)
            rows[1, column].imshow(Image.open(io.BytesIO(overlay)))
            rows[0, column].set_title(f"{answer['class']} {answer['confidence']:.0%}")
    for axes in rows.flat:
        axes.set_axis_off()
    figure.savefig(Path(__file__).with_name("answers.png"), dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
