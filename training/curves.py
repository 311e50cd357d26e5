"""A training's curves as an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draws loss and accuracy of each epoch, on training and held-out images, into the PNG `path`."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((quantity, "training"), (f"validation_{quantity}", "held out")):
            axes.plot(epochs, [figures[key] for figures in history], marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
