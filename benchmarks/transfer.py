"""Compare transfer in two phases with training from scratch, for a user with few images.

A backbone is trained on six of CIFAR-10's classes, by the functions of the pipeline's own commands. Then networks learn
the other four classes, 50 images each, from the backbone and from random weights: the same number of steps, the same
rates, the best of them chosen on held-out images, three seeds. The test images of the four classes decide nothing.

Finished runs are kept in the work folder: a second call continues where the first stopped.

    python benchmarks/transfer.py [--minutes 4]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from contracts.model import load as load_contract
from training.data.images import CIFAR10_CLASSES, Images, load_test_images, load_training_images
from training.evaluate.inference import predict_logits
from training.evaluate.test_set_log import record_look
from training.package.artifacts import read_model, weights_sha256
from training.recipe import Augmentation, Recipe, recipe_to_dict
from training.tracking.store import environment
from training.train import resume, train

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKBONE_CLASSES = ("airplane", "automobile", "bird", "cat", "frog", "ship")
CLASSES = ("deer", "dog", "horse", "truck")
BACKBONE_IMAGES = 2000  # of each class
IMAGES = 50  # of each class to train on, and as many held out to choose epoch and rate
RATES = (0.01, 0.03, 0.1, 0.3)
SEEDS = (0, 1, 2)  # rates are tried with the first one
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parent / "results" / "transfer.json"
LOOKS = Path(__file__).parents[1] / "results" / "test_looks.jsonl"

SHORT = Augmentation(operations=1, magnitude=5)
BACKBONE = Recipe(
    name="six", validation=0.1, epochs=5, batch_size=64, sizes=((0.0, 16), (0.4, 20), (0.8, 24)), augmentation=SHORT
)  # fmt: skip
SCRATCH = Recipe(
    name="four", validation=0.5, epochs=15, batch_size=20, sizes=((0.0, 16), (0.4, 24), (0.8, 32)), augmentation=SHORT
)  # fmt: skip
TRANSFER = replace(SCRATCH, head_epochs=4, epochs=11)


def main() -> None:
    """Train the missing runs until the time is up, and write the results so far."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=60, help="start no new run after this time")
    options.add_argument("--work", type=Path, default=Path(".gradserve") / "transfer")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    work = chosen.work.resolve()
    until = time.monotonic() + 60 * chosen.minutes
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work}/mlflow.db")
    if not (work / "four").is_dir():
        write_folders(work)
    backbone = finished(work / "backbone", replace(BACKBONE, data=f"imagefolder:{work / 'six'}"))
    four = f"imagefolder:{work / 'four'}"
    arms = {
        "transfer": replace(TRANSFER, data=four, pretrained=str(backbone / "best.pth")),
        "from scratch": replace(SCRATCH, data=four),
    }
    runs = list(tried(arms, work, until))
    report = summarise(runs, backbone)
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output}" if report["complete"] else "time is up: run it again to continue")


def write_folders(work: Path) -> None:
    """Write the two data sets as folders of images, as a user would have them."""
    training, size = load_training_images("cifar10", CACHE)
    test = load_test_images("cifar10", CACHE, size)
    write_images(training, BACKBONE_CLASSES, BACKBONE_IMAGES, work / "six")
    write_images(training, CLASSES, 2 * IMAGES, work / ".four" / "train")
    write_images(test, CLASSES, len(test), work / ".four" / "test")
    (work / ".four").rename(work / "four")


def write_images(images: Images, classes: tuple[str, ...], count: int, folder: Path) -> None:
    """Write the first `count` images of each class as PNG."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in np.flatnonzero(images.labels == CIFAR10_CLASSES.index(name))[:count]:
            Image.fromarray(images.images[index]).save(folder / name / f"{index}.png")


def finished(folder: Path, recipe: Recipe) -> Path:
    """Return the folder of the finished training by `recipe`; an interrupted training is continued."""
    if not (folder / "done").exists():
        if (folder / "last.pt").exists():
            resume(folder, CACHE, registers=False)
        else:
            train(recipe, folder, CACHE, registers=False)
        (folder / "done").touch()
    return folder


def tried(arms: dict[str, Recipe], work: Path, until: float) -> Iterator[dict]:
    """Return the results of all runs until the time is up: each rate with the first seed, the best with all seeds."""
    held_out: dict[tuple[str, float], float] = {}
    for name, recipe in arms.items():
        for rate in RATES:
            if time.monotonic() > until:
                return
            folder = finished(folder_of(name, rate, SEEDS[0], work), replace(recipe, rate=rate, seed=SEEDS[0]))
            history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            held_out[name, rate] = max(epoch["validation_accuracy"] for epoch in history)
            yield {"arm": name, "rate": rate, "seed": SEEDS[0], "held_out_accuracy": held_out[name, rate]}
    for seed in SEEDS:
        for name, recipe in arms.items():
            if time.monotonic() > until:
                return
            best = max(RATES, key=lambda rate, name=name: held_out[name, rate])
            folder = finished(folder_of(name, best, seed, work), replace(recipe, rate=best, seed=seed))
            yield {"arm": name, "rate": best, "seed": seed, "test_accuracy": test_accuracy(folder, recipe.data)}


def folder_of(arm: str, rate: float, seed: int, work: Path) -> Path:
    """Return a run's folder."""
    return work / f"{arm.replace(' ', '-')}-{rate}-{seed}"


def test_accuracy(folder: Path, data: str) -> float:
    """Return the share of the test images that the run's model classifies correctly; measured once."""
    path = folder / "test_accuracy"
    if not path.exists():
        contract, network = read_model(folder)
        test = load_test_images(data, CACHE, contract.input)
        answers = predict_logits(network, test.images, contract.input, bf16=True).argmax(1).numpy()
        accuracy = float((answers == test.labels).mean())
        record_look(
            LOOKS,
            "benchmarks/transfer.py: four classes",
            model=folder.name,
            weights_sha256=weights_sha256(folder),
            commit=environment()["git_commit"],
            data="cifar10",
            images=len(test),
            accuracy=accuracy,
        )
        path.write_text(f"{accuracy}\n", encoding="utf-8")
    return float(path.read_text(encoding="utf-8"))


def summarise(runs: list[dict], backbone: Path) -> dict:
    """Return the report."""
    arms = {}
    for name in dict.fromkeys(run["arm"] for run in runs):
        measured = [run for run in runs if run["arm"] == name and "test_accuracy" in run]
        scores = [run["test_accuracy"] for run in measured]
        arms[name] = {
            "rate": measured[0]["rate"] if measured else None,
            "seeds": len(scores),
            "test_accuracy": mean(scores) if scores else None,
            "test_accuracy_sd": stdev(scores) if len(scores) > 1 else None,
        }
    accepted = load_contract(backbone / "contract.json").accepted
    return {
        "backbone": {
            "classes": BACKBONE_CLASSES,
            "images": len(BACKBONE_CLASSES) * BACKBONE_IMAGES,
            "held_out_accuracy": accepted.figures.validation_accuracy,
            "recipe": (accepted.recipe or {}) | {"data": "imagefolder:six"},
        },
        "classes": CLASSES,
        "images": len(CLASSES) * IMAGES,
        "steps": SCRATCH.epochs * (len(CLASSES) * IMAGES // SCRATCH.batch_size),
        "rates_tried": RATES,
        "arms": arms,
        "complete": len(runs) == 2 * (len(RATES) + len(SEEDS)),
        "runs": runs,
        "recipes": {"transfer": recipe_to_dict(TRANSFER), "from scratch": recipe_to_dict(SCRATCH)},
        "environment": environment(),
    }


def show(report: dict) -> None:
    """Print the table."""
    print(f"{report['images']} images of {len(report['classes'])} classes, {report['steps']} steps")
    for name, arm in report["arms"].items():
        if arm["seeds"] > 1:
            figures = f"{arm['test_accuracy']:.1%} ± {arm['test_accuracy_sd']:.1%}"
            print(f"{name:14s} rate {arm['rate']:5} {figures}  ({arm['seeds']} seeds)")


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    main()
