"""Measure all layers and methods for heatmaps on held-out images, as `package` does before it chooses.

The script writes the figures, and an image that shows the layers side by side.

    python benchmarks/explanations.py [MODEL_FOLDER] [--images 500]
"""

from __future__ import annotations

import os

from control.agent.cores import usable_cores

os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))  # before torch and OpenVINO read it

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from handlers.engines import build_engine, predict_all
from handlers.preprocess import normalise
from training.evaluate.explanations import LAYERS, choose_explanation, explain
from training.evaluate.figures import overlay
from training.package.artifacts import read_model, weights_sha256
from training.package.packaging import split_images
from training.recipe import recipe_from_dict
from training.tracking.store import environment

if TYPE_CHECKING:
    from contracts.model import Contract
    from training.data.images import Images

RIGHT, WRONG = 5, 3  # images in the contact sheet
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parent / "results" / "explanations.json"
IMAGE = Path(__file__).parents[1] / "docs" / "heatmap-layers.png"


def main() -> None:
    """Measure, print the table, write it as JSON and draw the image."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--images", type=int, default=500)
    options.add_argument("--output", type=Path, default=RESULT)
    options.add_argument("--image", type=Path, default=IMAGE)
    chosen = options.parse_args()
    contract, network = read_model(chosen.folder)
    _, held_out = split_images(recipe_from_dict(contract.accepted.recipe or {}), CACHE)
    shown = held_out.sample(chosen.images)
    images = normalise(shown.images, contract.input)
    engine = build_engine(contract.engine, network, directory=chosen.folder, device=torch.device("cpu"))
    draw(contract, network, shown, predict_all(engine, images).argmax(axis=1), chosen.image)
    started = time.perf_counter()
    _, measured = choose_explanation(network, contract, engine, images)
    report = {
        "model": f"{contract.name} {contract.version}",
        "weights_sha256": weights_sha256(chosen.folder),
        "part": "held out",
        **measured,
        "seconds": round(time.perf_counter() - started, 1),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output} and {chosen.image}")


def draw(contract: Contract, network: torch.nn.Module, shown: Images, answers: np.ndarray, path: Path) -> None:
    """Draw a row for each image, right answers first, and a column for each layer, by the contract's first method."""
    right = answers == shown.labels
    rows = [*np.flatnonzero(right)[:RIGHT], *np.flatnonzero(~right)[:WRONG]]
    images = normalise(shown.images[rows], contract.input)
    method = contract.explain.methods[0]
    heatmaps = [
        explain(network, replace(contract.explain, layer=layer, method=method), images, answers[rows])
        for layer in LAYERS
    ]
    figure = Figure(figsize=(1.6 * (len(LAYERS) + 1), 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(LAYERS) + 1)
    for axes in grid.flat:
        axes.axis("off")
    for number, index in enumerate(rows):
        grid[number, 0].imshow(shown.images[index])
        answer, label = contract.classes[answers[index]], contract.classes[shown.labels[index]]
        grid[number, 0].set_title(answer if answer == label else f"{answer} (is: {label})", fontsize=8)
        for column, layer in enumerate(LAYERS, 1):
            grid[number, column].imshow(overlay(shown.images[index], heatmaps[column - 1][number]))
            if number == 0:
                grid[number, column].set_title(f"{method}, {layer}", fontsize=8)
    figure.savefig(path, dpi=90)


def show(report: dict) -> None:
    """Print the table."""
    print(f"{report['model']}, {report['images']} held-out images, {report['seconds']:.0f} s")
    print(
        f"{'layer':14s} {'method':10s} {'score':>6s} {'deletion':>9s} {'insertion':>9s}  like random weights' heatmaps"
    )
    for row in report["candidates"]:
        areas = f"{row['score']:6.3f} {row['deletion_area']:9.3f} {row['insertion_area']:9.3f}"
        print(f"{row['layer']:14s} {row['method']:10s} {areas}  {row['similarity']:.2f}")
    row = report["random"]
    print(f"{'random order':25s} {row['score']:6.3f} {row['deletion_area']:9.3f} {row['insertion_area']:9.3f}")
    print(f"chosen: {report['chosen']['method']} on {report['chosen']['layer']}")


if __name__ == "__main__":
    main()
