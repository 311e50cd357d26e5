"""Figures of an evaluation: confusion, calibration, curves of the explanations, answers with heatmaps."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from handlers.overlay import draw_overlay

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from training.evaluate.calibration import Reliability

SAMPLES = 8
"""Right answers in the upper row of the image of samples, wrong ones in the lower."""

_SHOWN_SIZE = (128, 128)  # a small image's dots stay visible
_HEAT = 0.55
_LARGEST_INCHES = 33.0
_MOST_COUNTED = 50  # classes whose counts still fit into the confusion matrix's cells


@dataclass(frozen=True)
class Sample:
    """An image (H, W, 3) uint8 with its heatmap (H, W) in 0..1 and what to say about it."""

    pixels: NDArray[np.uint8]
    heatmap: NDArray[np.float32]
    caption: str


def plot_confusion(confusion: list[list[int]], classes: tuple[str, ...], path: Path) -> None:
    """Draws the confusion matrix into the PNG `path`; colours are shares of the true class."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.62 * len(classes) + 1.5), _LARGEST_INCHES)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    for (row, column), count in np.ndenumerate(counts):
        if len(classes) > _MOST_COUNTED:
            break
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_calibration(curves: dict[str, Reliability], path: Path) -> None:
    """Draws accuracy over confidence, by the curves' names, into the PNG `path`."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect")
    for name, (confident, correct, images) in curves.items():
        filled = images > 0
        axes.plot(confident[filled] / images[filled], correct[filled] / images[filled], marker=".", label=name)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_explanation(report: dict[str, Any], path: Path) -> None:
    """Draws the deletion and insertion curves of `measure_explanation`'s report into the PNG `path`."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    curves = {
        f"{report['method']}, {report['layer']}": report["curves"],
        "another image's heatmap": report["stranger"],
        "random order": report["random"],
    }
    for axes, (kind, what) in zip(
        figure.subplots(1, 2), (("deletion", "greyed"), ("insertion", "restored")), strict=True
    ):
        for name, values in curves.items():
            shares = np.linspace(0, 1, len(values[kind]))
            axes.plot(shares, values[kind], marker=".", label=f"{name}: {values[f'{kind}_area']:.3f}")
        axes.set_xlabel(f"share of the pixels {what}, hottest first")
        axes.set_ylabel("confidence in the class")
        axes.grid(alpha=0.3)
        axes.legend(title="area", fontsize=8, loc="upper right" if kind == "deletion" else "lower right")
    figure.savefig(path, dpi=120)


def draw_samples(rows: Sequence[Sequence[Sample]], path: Path) -> None:
    """Draw rows of images with captions above and heatmaps below into the PNG `path`."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.5 * columns, 3.5 * len(rows)), layout="constrained")
    grid = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for number, row in enumerate(rows):
        for column, sample in enumerate(row):
            upper, lower = grid[2 * number : 2 * number + 2, column]
            upper.imshow(Image.fromarray(sample.pixels).resize(_SHOWN_SIZE, Image.Resampling.NEAREST))
            upper.set_title(sample.caption, fontsize=8)
            lower.imshow(overlay(sample.pixels, sample.heatmap))
    figure.savefig(path, dpi=110)


def overlay(pixels: NDArray[np.uint8], heatmap: NDArray[np.float32]) -> Image.Image:
    """The heatmap (H, W) over its image (H, W, 3), as serving draws it."""
    return Image.open(io.BytesIO(draw_overlay(Image.fromarray(pixels), heatmap, size=_SHOWN_SIZE, alpha=_HEAT)))
