"""Draw docs/answers.png from a running gateway: the evidence for the answers to three images.

python docs/make_picture.py http://127.0.0.1:8000
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure, SubFigure
from PIL import Image

from gradserve import Client, Evidence, Similar, Unavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "gateway" / "page" / "samples" / "cat-and-ship.png"
STRANGE = ROOT / "gateway" / "page" / "samples" / "clock.png"
KNOWN = ROOT / "tests" / "samples" / "dog" / "0.png"
ASKED = ("cat", "ship", "horse")  # of the pair; the last one is not in the image
NEIGHBOURS = 3
WIDTH, HEIGHT, DPI = 10.0, 4.6, 124  # inches; half as many pixels again as a README shows
SIDE = 384
ALPHA = 0.6


def main(address: str) -> None:
    """Ask about the three images and write the figure beside this file."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.7, 1), hspace=0.02)
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 2), wspace=0.04)
    with Client(address) as client:
        draw_classes(client, top)
        draw_strange(client, left)
        draw_neighbours(client, right)
    path = Path(__file__).with_name("answers.png")
    figure.savefig(path, dpi=DPI)
    Image.open(path).convert("RGB").save(path, optimize=True)


def draw_classes(client: Client, figure: SubFigure) -> None:
    """Draw one image and what speaks for several classes in it."""
    axes = figure.subplots(1, 1 + len(ASKED))
    top = client.predict(PAIR, top_k=2).top
    title(figure, "One image, asked about three classes: what speaks for each")
    show(axes[0], Image.open(PAIR), ", ".join(f"{entry.class_name} {entry.confidence:.0%}" for entry in top))
    for place, name in zip(axes[1:], ASKED, strict=True):
        found = client.evidence(PAIR, target=name, heatmap=False)
        confidence = found.target.confidence or 0.0
        show(place, overlay(client, PAIR, name), f"{name}? {confidence:.1%}")


def draw_strange(client: Client, figure: SubFigure) -> None:
    """Draw an image of something that the model does not know."""
    found = client.evidence(STRANGE, heatmap=False)
    title(figure, "Unfamiliar" if found.familiar is False else "Familiar")
    more = f"{1 - found.familiarity:.0%}" if isinstance(found.familiarity, float) else "?"
    text = f"{found.class_name} {found.confidence:.0%}; {more} of known\nimages are more familiar"
    show(figure.subplots(), Image.open(STRANGE), text)


def draw_neighbours(client: Client, figure: SubFigure) -> None:
    """Draw an image and the training images that are nearest to it, of the answer and of the runner-up."""
    found = client.evidence(KNOWN, similar=NEIGHBOURS, heatmap=False)
    title(figure, "The nearest training images of the answer and of the runner-up")
    grid = figure.subplot_mosaic(
        [["image", "image", *(f"{row}{place}" for place in range(NEIGHBOURS))] for row in "ab"]
    )
    show(grid["image"], Image.open(KNOWN), f"{found.class_name} {found.confidence:.1%}")
    for row, similar in zip("ab", by_class(found), strict=True):
        for place, neighbour in enumerate(similar):
            thumbnail = Image.open(io.BytesIO(client.example(neighbour)))
            show(grid[f"{row}{place}"], thumbnail, f"{neighbour.class_name} {neighbour.similarity:.2f}")


def by_class(found: Evidence) -> list[list[Similar]]:
    """Return the similar images of the answer's class and those of the runner-up's.

    Raises:
        SystemExit: the version has none.
    """
    if isinstance(found.similar, Unavailable):
        raise SystemExit(f"no similar images: {found.similar.reason}")
    of_answer = [similar for similar in found.similar if similar.class_name == found.class_name]
    return [of_answer, [similar for similar in found.similar if similar.class_name != found.class_name]]


def overlay(client: Client, path: Path, target: str) -> Image.Image:
    """Return the image with the heatmap of a class."""
    return Image.open(io.BytesIO(client.explain(path, target=target, size=SIDE, alpha=ALPHA)))


def title(figure: SubFigure, text: str) -> None:
    """Write the headline of a part of the figure."""
    figure.suptitle(text, fontsize=12, fontweight="bold")


def show(axes: Axes, image: Image.Image, text: str) -> None:
    """Draw an image with a line above it."""
    scale = SIDE / max(image.size)
    axes.imshow(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS))
    axes.set_title(text, fontsize=11)
    axes.set_axis_off()


if __name__ == "__main__":
    main(sys.argv[1])
