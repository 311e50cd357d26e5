"""Measure the training loop on a GPU: plain steps, steps recorded as CUDA graphs, torch.compile, and one nccl process.

The images are random, for the speed does not depend on them. Each way trains the same batches from the same weights, so
the losses of plain and recorded steps must be alike. Speeds are medians over the timed epochs of each setting.

    python benchmarks/gpu/speed.py [--images 22500] [--rounds 2] [--output benchmarks/results/training_gpu.json]
"""

from __future__ import annotations

import argparse
import json
import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from handlers.network import build_network
from training.data.images import CIFAR10_CLASSES, CIFAR10_INPUT, Images
from training.data.training_data import TrainingData, make_loader
from training.epoch import train_epoch
from training.recipe import Recipe, recipe_from_dict
from training.run import Run
from training.tracking.store import environment

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "training_gpu.json"
SIDES, BATCHES = (24, 32), (512, 1024)
PLAIN, RECORDED, COMPILED, NCCL = "plain", "recorded", "compiled", "one nccl process"


def main() -> None:
    """Measure, print and write the report after each setting, so that a call that is cut off leaves what it has."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=22_500)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    released = recipe_from_dict(tomllib.loads((ROOT / "training" / "released.toml").read_text(encoding="utf-8")))
    data = random_images(chosen.images)
    speeds: dict = {}
    losses: dict = {}
    for mode, batch, (side, radius) in settings():
        kind = f"{side}{', sharpness-aware' if radius else ''}"
        recipe = replace(
            released, batch_size=batch, sizes=((0.0, side),), sam_radius=radius, sam_from=0.0,
            epochs=chosen.rounds + 1, cuda_graphs=mode == RECORDED,
        )  # fmt: skip
        try:
            figures = epochs(recipe, data, mode)
        except RuntimeError as error:  # out of memory, or a way that this machine has not
            print(mode, batch, kind, str(error).splitlines()[0])
            continue
        speed = median(figure["images_per_s"] for figure in figures[1:])  # the first one warms up and records
        speeds.setdefault(mode, {}).setdefault(str(batch), {})[kind] = round(speed)
        losses.setdefault(mode, {}).setdefault(str(batch), {})[kind] = [round(figure["loss"], 5) for figure in figures]
        print(f"{mode}, batches of {batch}, {kind} pixels: {speed:.0f} images/s")
        report = {
            "images": chosen.images,
            "rounds": chosen.rounds,
            "images_per_s": speeds,
            "losses": losses,
            "environment": environment(),
        }
        chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def settings() -> list[tuple[str, int, tuple[int, float]]]:
    """Return what is measured: way, batch size, image size and sharpness-aware radius.

    What matters most comes first, and last what compiles for a minute.
    """
    kinds = [*((side, 0.0) for side in SIDES), (SIDES[-1], 0.1)]
    own = [(mode, batch, kind) for batch, kind, mode in product(BATCHES, kinds, (PLAIN, RECORDED))]
    return [*own, (NCCL, BATCHES[0], kinds[1]), (COMPILED, BATCHES[0], kinds[1])]


def random_images(count: int) -> TrainingData:
    """Return `count` images of noise to train on, and one to hold out."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count + 1, 32, 32, 3), np.uint8)
    images = Images(pixels, rng.integers(0, 10, count + 1), CIFAR10_CLASSES)
    return TrainingData(images.pick(np.arange(count)), images.pick(np.array([count])), CIFAR10_INPUT, images.sha256())


def epochs(recipe: Recipe, data: TrainingData, mode: str) -> list[dict[str, float]]:
    """Train the recipe's epochs in the given way and return their figures."""
    torch.manual_seed(0)
    network = build_network("resnet18_small", len(CIFAR10_CLASSES))
    run = Run(recipe, Path(), data, network, architecture="resnet18_small")
    loader, batches = make_loader(data, recipe.augmentation, recipe, run.group)
    run.begin_phase()
    if mode == COMPILED:
        run.trained_network = torch.compile(run.network, mode="reduce-overhead")
    if mode == NCCL:
        backend, store = "nccl" if run.device.type == "cuda" else "gloo", distributed.HashStore()
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        run.trained_network = DistributedDataParallel(run.network)
    figures = []
    try:
        while not run.is_finished:
            figures.append(train_epoch(run, loader, batches))
            run.end_epoch(figures[-1] | {"validation_accuracy": 0.0})
    finally:
        if mode == NCCL:
            distributed.destroy_process_group()
    return figures


if __name__ == "__main__":
    main()
