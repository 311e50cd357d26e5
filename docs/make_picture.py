"""Draw docs/answers.png from a running gateway: two images side by side as one, and the heatmap of each one's class.

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
PAIRS = (("cat", "ship"), ("horse", "truck"), ("dog", "airplane"), ("bird", "ship"))
NUMBERS = ((0, 0), (1, 0), (1, 3), (2, 3))  # of the samples: the first ones whose pair is answered with both classes
SIDE = 256


def main(address: str) -> None:
    """Ask about each pair once, ask for the heatmap of both classes, and write the figure beside this file."""
    figure = Figure(figsize=(3 * len(PAIRS), 5.3), layout="constrained")
    rows = figure.subplots(3, len(PAIRS))
    with httpx.Client(base_url=address, timeout=30) as client:
        for column, (pair, numbers) in enumerate(zip(PAIRS, NUMBERS, strict=True)):
            data = side_by_side(*(SAMPLES / name / f"{number}.png" for name, number in zip(pair, numbers, strict=True)))
            answer = client.post("/predict", params={"top_k": 2}, files={"file": data}).raise_for_status().json()
            image = Image.open(io.BytesIO(data))
            rows[0, column].imshow(image.resize((SIDE, SIDE // 2), Image.Resampling.LANCZOS))
            rows[0, column].set_title(", ".join(f"{top['class']} {top['confidence']:.0%}" for top in answer["top"]))
            for row, target in enumerate(pair, start=1):
                asked = {"size": SIDE, "target": target}
                overlay = client.post("/explain", params=asked, content=data).raise_for_status().content
                rows[row, column].imshow(Image.open(io.BytesIO(overlay)))
                rows[row, column].set_title(f"what speaks for {target}")
    for axes in rows.flat:
        axes.set_axis_off()
    figure.savefig(Path(__file__).with_name("answers.png"), dpi=80)


def side_by_side(left: Path, right: Path) -> bytes:
    """Return both images, of one height, as one PNG."""
    images = [Image.open(path) for path in (left, right)]
    both = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    both.paste(images[0], (0, 0))
    both.paste(images[1], (images[0].width, 0))
    file = io.BytesIO()
    both.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main(sys.argv[1])
