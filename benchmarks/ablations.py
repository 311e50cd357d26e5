"""Train a narrow ResNet-18 on few small images by several recipes, to choose what a training on a GPU should try first.

All recipes change one thing of another one. For each seed, the recipes learn the same images, and all are measured on
the same other images, which are neither learnt nor test images: accuracy, calibration, and accuracy on corrupted
copies. The temperature is fitted on the images on which calibration is measured; it is one number for all of them.

Each training runs in one thread: start the script once for each core. The processes share the trainings, seed by seed,
and finished ones are kept in the work folder, where later calls continue.

    python benchmarks/ablations.py [--minutes 60] & python benchmarks/ablations.py [--minutes 60]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import cv2
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from handlers.engines import softmax
from handlers.network import ResNet, build_network
from training.data.augment import EpochBatches
from training.data.device_augment import DeviceLoader
from training.data.images import CIFAR10_CLASSES, CIFAR10_INPUT, Images, load_training_images, stratified_split
from training.data.training_data import TrainingData
from training.epoch import train_epoch
from training.evaluate.calibration import expected_calibration_error, fit_temperature
from training.evaluate.corruptions import corrupt
from training.evaluate.inference import predict_logits
from training.recipe import Augmentation, Recipe, recipe_to_dict
from training.run import Run
from training.tracking.store import environment

# After handlers.network, which makes torchvision importable beside a CPU-only torch.
from torchvision.models.resnet import BasicBlock  # isort: skip

SIDE = 16  # pixels: CIFAR-10's images at half their size
WIDTH = 16  # channels of the first stage, a quarter of ResNet-18's
IMAGES, MEASURED, CORRUPTED = 3000, 2000, 1000  # to learn from; to measure on; of these, to corrupt
KINDS = ("gaussian_noise", "glass_blur", "pixelate", "fog", "contrast", "jpeg_compression")
SEVERITY = 3
SEEDS = (0, 1, 2)
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parent / "results" / "ablations.json"

BASELINE = Recipe(
    epochs=14, batch_size=64, rate=0.1, warm_up=0.1, label_smoothing=0.05, average=0.99, workers=0,
    augmentation=Augmentation(operations=2, magnitude=9, cutmix=0.5),
)  # fmt: skip
PIXMIX = replace(BASELINE, augmentation=replace(BASELINE.augmentation, pixmix=0.5))
ARMS = {
    "baseline": BASELINE,
    "PixMix": PIXMIX,
    "PixMix, sharpness-aware": replace(PIXMIX, sam_radius=0.1, sam_from=0.75),
    "PixMix, no CutMix": replace(PIXMIX, augmentation=Augmentation(2, 9, pixmix=0.5)),
    "PixMix for all, no CutMix": replace(PIXMIX, augmentation=Augmentation(2, 9, pixmix=1.0)),
    "PixMix, bilinear": replace(PIXMIX, augmentation=replace(PIXMIX.augmentation, bilinear=True)),
    "PixMix, consistency": replace(PIXMIX, consistency=12.0),
}


def main() -> None:
    """Train what is missing until the time is up, and write the report after each training."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=600, help="start no training after this time")
    options.add_argument("--work", type=Path, default=Path(".gradserve") / "ablations")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    until = time.monotonic() + 60 * chosen.minutes
    work = chosen.work / hashlib.sha256(json.dumps(settings()).encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    images, _ = load_training_images("cifar10", CACHE)
    images = shrunk(images)
    for seed in SEEDS:
        learnt, measured = divided(images, seed)
        for number, (name, recipe) in enumerate(ARMS.items()):
            path = work / f"{seed}-{number}.json"
            lock = FileLock(path.with_suffix(".lock"), blocking=False)
            with suppress(Timeout), lock:  # another process trains it
                if path.exists():
                    continue
                if time.monotonic() > until:
                    sys.exit("time is up: run it again to continue")
                found = {"arm": name, "seed": seed, **trained(replace(recipe, seed=seed), learnt, measured)}
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                write_report(work, chosen.output)
                print(json.dumps(found), flush=True)


def write_report(work: Path, output: Path) -> None:
    """Write what the finished trainings in the folder `work` found."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.json"))]
    report = {"settings": settings(), "arms": summarise(runs), "runs": runs, "environment": environment()}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def settings() -> dict:
    """Return all that a figure depends on."""
    return {
        "side": SIDE,
        "width": WIDTH,
        "images": IMAGES,
        "measured_images": MEASURED,
        "corrupted_images": CORRUPTED,
        "severity": SEVERITY,
        "recipes": {name: recipe_to_dict(recipe) for name, recipe in ARMS.items()},
    }


def shrunk(images: Images) -> Images:
    """Return the images with `SIDE` pixels each way: a pixel is the mean of those that it covers."""
    pixels = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images.images]
    return replace(images, images=np.stack(pixels))


def divided(images: Images, seed: int) -> tuple[Images, Images]:
    """Return the images that a seed's trainings learn, and those to measure on, which are the same for all seeds."""
    rest, measured = stratified_split(images.labels, MEASURED, 0)
    _, learnt = stratified_split(images.labels[rest], IMAGES, seed)
    return images.pick(rest[learnt]), images.pick(measured)


def trained(recipe: Recipe, learnt: Images, measured: Images) -> dict:
    """Train by `recipe` and return the figures of the last averaged weights."""
    torch.manual_seed(recipe.seed)
    size = replace(CIFAR10_INPUT, height=SIDE, width=SIDE)
    data = TrainingData(learnt, measured, size, learnt.sha256())
    run = Run(recipe, Path(), data, narrow_network(), architecture="resnet18_small")
    batches = EpochBatches(len(learnt), recipe.batch_size, recipe.seed)
    # As on a GPU: all recipes have the same code for what they have in common.
    loader = DeviceLoader(
        learnt, size, recipe.augmentation, batches, seed=recipe.seed, device=run.device, views=recipe.views
    )
    run.begin_phase()
    started = time.process_time()
    while not run.is_finished:
        figures = train_epoch(run, loader, batches)
        run.end_epoch(figures | {"validation_accuracy": 0.0})
    seconds = time.process_time() - started
    return {"processor_s": round(seconds, 1), "loss": figures["loss"], **measure(run.kept(), measured, run)}


def measure(network: nn.Module, images: Images, run: Run) -> dict:
    """Return accuracy and calibration error on `images` and on corrupted copies of the first of them."""
    size = run.data.input
    logits = predict_logits(network, images.images, size, bf16=run.bf16).numpy()
    temperature = fit_temperature(logits, images.labels)
    rough = np.random.default_rng(0).permutation(len(images))[:CORRUPTED]
    labels = images.labels[rough]
    corrupted = {
        kind: predict_logits(network, corrupt(images.images[rough], kind, SEVERITY), size, bf16=run.bf16).numpy()
        for kind in KINDS
    }
    accuracies = {kind: float((found.argmax(1) == labels).mean()) for kind, found in corrupted.items()}
    probabilities = np.concatenate([softmax(found, temperature) for found in corrupted.values()])
    return {
        "accuracy": float((logits.argmax(1) == images.labels).mean()),
        "corrupted": mean(accuracies.values()),
        **accuracies,
        "calibration_error": expected_calibration_error(softmax(logits, temperature), images.labels),
        "calibration_error_corrupted": expected_calibration_error(probabilities, np.tile(labels, len(KINDS))),
    }


def narrow_network() -> ResNet:
    """Return `resnet18_small` with `WIDTH` channels in its first stage instead of 64."""
    network = build_network("resnet18_small", len(CIFAR10_CLASSES))
    network.inplanes = WIDTH
    network.conv1 = nn.Conv2d(3, WIDTH, kernel_size=3, stride=1, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(WIDTH)
    for stage in range(4):
        layer = network._make_layer(BasicBlock, WIDTH << stage, 2, stride=2 if stage else 1)  # noqa: SLF001
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(WIDTH << 3, len(CIFAR10_CLASSES))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def summarise(runs: list[dict]) -> dict:
    """Return mean and standard deviation of each figure by recipe, over the seeds with which all recipes have trained.

    `gain` is that over the recipe "PixMix", seed by seed.
    """
    seeds = [seed for seed in SEEDS if sum(run["seed"] == seed for run in runs) == len(ARMS)]
    by_arm = {
        name: [run for seed in seeds for run in runs if (run["arm"], run["seed"]) == (name, seed)] for name in ARMS
    }
    figures = ("accuracy", "corrupted", *KINDS, "calibration_error", "calibration_error_corrupted", "processor_s")
    if not seeds:
        return {}
    return {
        name: {
            "seeds": len(seeds),
            **{figure: _spread([run[figure] for run in found]) for figure in figures},
            "gain": {
                figure: _spread(
                    [run[figure] - other[figure] for run, other in zip(found, by_arm["PixMix"], strict=True)]
                )
                for figure in ("accuracy", "corrupted")
            },
        }
        for name, found in by_arm.items()
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": round(mean(values), 4),
        "standard_deviation": round(stdev(values), 4) if len(values) > 1 else None,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
