"""Measure the candidates for heatmaps on held-out images, as `package --explain-images` does before it chooses.

The script writes the figures, and an image that shows the methods side by side: for the classes of images of two
things, for right and wrong answers, and for images of something else.

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
from training.evaluate.figures import overlay
from training.evaluate.heatmaps.choice import CANDIDATES, choose_explanation
from training.evaluate.heatmaps.passes import explain, run
from training.package.artifacts import read_model, weights_sha256
from training.package.packaging import split_images
from training.recipe import recipe_from_dict
from training.tracking.store import environment

if TYPE_CHECKING:
    from contracts.model import Contract
    from training.data.images import Images

SHOWN = tuple(row for row in CANDIDATES if row[0] in {"contrastcam", "sharpcam", "cam"} or "+" in row[1])[::-1]
COLUMNS = ("0.8.0's default", "cam = Grad-CAM, layer4", "sharpcam", "contrastcam")
TWO, RIGHT, WRONG = 2, 2, 2  # images in the contact sheet; each of the first two has two rows
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
    engine = build_engine(contract.engine, lambda: network, directory=chosen.folder, device=torch.device("cpu"))
    draw(contract, network, shown, predict_all(engine, images).argmax(axis=1), chosen.image)
    started, busy = time.perf_counter(), time.process_time()
    _, measured = choose_explanation(network, contract, engine, images, shown.labels, max_alike=1)
    report = {
        "model": f"{contract.name} {contract.version}",
        "weights_sha256": weights_sha256(chosen.folder),
        "part": "held out",
        **measured,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output} and {chosen.image}")


def draw(contract: Contract, network: torch.nn.Module, shown: Images, answers: np.ndarray, path: Path) -> None:
    """Draw a row for each image and class asked for, and a column for each method."""
    rows = [*two_things(contract, shown, answers), *answered(contract, shown, answers), *unfamiliar(contract, network)]
    pixels, targets = np.stack([row[0] for row in rows]), np.array([row[1] for row in rows])
    images = normalise(pixels, contract.input)
    choices = [
        replace(contract.explain, method=method, layer=layer, sharp_layer=sharp) for method, layer, sharp in SHOWN
    ]
    heatmaps = [explain(network, choice, images, targets) for choice in choices]
    figure = Figure(figsize=(1.6 * (len(COLUMNS) + 1), 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(COLUMNS) + 1)
    for axes in grid.flat:
        axes.axis("off")
    for number, (image, _, title) in enumerate(rows):
        grid[number, 0].imshow(image)
        grid[number, 0].set_title(title, fontsize=8)
        for column, name in enumerate(COLUMNS, 1):
            grid[number, column].imshow(overlay(image, heatmaps[column - 1][number]))
            if number == 0:
                grid[number, column].set_title(name, fontsize=8)
    figure.savefig(path, dpi=90)


def two_things(contract: Contract, shown: Images, answers: np.ndarray) -> list[tuple[np.ndarray, int, str]]:
    """Return images of two things, the middle halves of two images side by side, once for each of the two classes."""
    right = np.flatnonzero(answers == shown.labels)
    width = shown.images.shape[2]
    rows = []
    for pair in range(TWO):
        left = right[pair]
        other = next(index for index in right[TWO + pair :] if shown.labels[index] != shown.labels[left])
        middle = slice(width // 4, width // 4 + width // 2)
        both = np.concatenate([shown.images[index][:, middle] for index in (left, other)], axis=1)
        rows += [(both, int(shown.labels[i]), f"asked: {contract.classes[shown.labels[i]]}") for i in (left, other)]
    return rows


def answered(contract: Contract, shown: Images, answers: np.ndarray) -> list[tuple[np.ndarray, int, str]]:
    """Return images with the right answer, then some with a wrong one: as answered, and as it should be."""
    right = answers == shown.labels
    rows = [
        (shown.images[index], int(answers[index]), f"right: {contract.classes[answers[index]]}")
        for index in np.flatnonzero(right)[10 : 10 + RIGHT]
    ]
    for index in np.flatnonzero(~right)[:WRONG]:
        for kind, target in (("wrong", answers[index]), ("should be", shown.labels[index])):
            rows.append((shown.images[index], int(target), f"{kind}: {contract.classes[target]}"))
    return rows


def unfamiliar(contract: Contract, network: torch.nn.Module) -> list[tuple[np.ndarray, int, str]]:
    """Return an image of nothing that was learnt, noise, as answered."""
    size = (1, contract.input.height, contract.input.width, 3)
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    answer = int(run(network, normalise(noise, contract.input)).probabilities.argmax())
    return [(noise[0], answer, f"noise: {contract.classes[answer]}")]


def show(report: dict) -> None:
    """Print the table."""
    print(f"{report['model']}, {report['images']} held-out images, {report['cpu_seconds']:.0f} s of CPU")
    names = (
        "quarter", "quarter_peak", "half", "half_peak", "class_correlation", "random_head_correlation", "score", "road"
    )  # fmt: skip
    print(f"{'':26s}", *(f"{name[:8]:>8s}" for name in names))
    for row in [*report["candidates"], {"method": "random heat", "layer": ""} | report["random_heat"]]:
        values = ("" if row[name] is None else f"{row[name]:.3f}" for name in names)
        print(f"{row['method']:11s} {row['layer']:14s}", *(f"{value:>8s}" for value in values), row.get("admitted", ""))
    print(f"chosen: {report['chosen']['method']} on {report['chosen']['layer']}")


if __name__ == "__main__":
    main()
