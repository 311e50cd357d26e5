"""Compare our training loop with a bare PyTorch loop: same network, precision, batch and optimiser.

Ours runs a complete training: augmentation in the loader's process, resizing, label smoothing, averaged weights,
progress. The bare one only reads normalised tensors of the right size from memory; it runs in each of
a few settings, with the convolutions of `training.convolution` and with torch's own, of which the one with the highest
median counts. All are timed in turn within each round; shares are medians over rounds of shares within a round.

    python benchmarks/training_speed.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy, interpolate

from handlers.network import build_network
from handlers.preprocess import normalise
from training.convolution import use_patches
from training.data.training_data import make_loader
from training.epoch import train_epoch
from training.recipe import Recipe, recipe_from_dict
from training.tracking.store import environment
from training.train import begin_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training.run import Run

STEPS = {20: 16, 32: 8}  # per round, by image size: the smallest and the largest of the released recipe
BATCH = 128
WANTED = 0.9  # goal: share of the bare loop's images/s
PATCHES = "patch"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "training.json"


def main() -> None:
    """Measure, print the table and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    released = recipe_from_dict(tomllib.loads((ROOT / "training" / "released.toml").read_text(encoding="utf-8")))
    released = replace(released, batch_size=BATCH)  # its own is a GPU's
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {size: measure(released, size, chosen.rounds, Path(scratch)) for size in STEPS}
    report = summarise(sizes, released, chosen.rounds)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output}")


def measure(released: Recipe, size: int, rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Return images per second at this image size, one figure per round: of our loop, and of each bare setting."""
    image_count = STEPS[size] * released.batch_size
    recipe = replace(
        released,
        subset=round(1.01 * image_count / (1 - released.validation)),
        sizes=((0.0, size),),
        epochs=rounds + 1,
        cycles=(),
    )
    run = begin_run(recipe, scratch, CACHE)
    ours = our_rounds(run)
    images = interpolate(torch.from_numpy(normalise(run.data.training.images, run.data.input)), (size, size))
    labels = torch.from_numpy(run.data.training.labels)
    settings = {
        f"{layout}, {sgd} SGD, {convolutions} convolutions": BareLoop(
            run, images, labels, layout, fused=sgd == "fused", patches=convolutions == PATCHES
        )
        for layout, sgd, convolutions in product(LAYOUTS, ("foreach", "fused"), ("torch's", PATCHES))
    }
    rates: dict[str, list[float]] = {"ours": [], **{name: [] for name in settings}}
    for turn in range(rounds + 1):
        rate = {"ours": next(ours), **{name: loop.rate(STEPS[size]) for name, loop in settings.items()}}
        if turn:  # the first round warms up
            for name, measured in rate.items():
                rates[name].append(measured)
    return rates


def our_rounds(run: Run) -> Iterator[float]:
    """Yield the images per second of one epoch after the other."""
    loader, batches = make_loader(run.data, run.recipe.augmentation, run.recipe, run.group)
    while not run.is_finished:
        figures = train_epoch(run, loader, batches)
        yield figures["images_per_s"]
        run.end_epoch(figures | {"validation_accuracy": 0.0})


class BareLoop:
    """Shortest loop that trains this network: images in memory, no augmentation, no records."""

    def __init__(
        self, run: Run, images: torch.Tensor, labels: torch.Tensor, layout: str, *, fused: bool, patches: bool
    ) -> None:
        self.bf16 = run.bf16
        self.batch_size = run.recipe.batch_size
        self.device = run.device
        self.layout = LAYOUTS[layout]
        self.images = images.to(run.device).contiguous(memory_format=self.layout)
        self.labels = labels.to(run.device)
        network = build_network(run.architecture, len(run.data.classes))
        self.network = network.to(run.device).to(memory_format=self.layout).train()
        if patches:
            use_patches(self.network)
        parameters = self.network.parameters()
        self.optimiser = torch.optim.SGD(
            parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused, foreach=not fused
        )

    def rate(self, steps: int) -> float:
        """Return the images per second over a number of steps."""
        order = torch.randperm(len(self.images), device=self.device)
        self._finish()
        started = time.perf_counter()
        for step in range(steps):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.network(self.images[chosen].contiguous(memory_format=self.layout))
                loss = cross_entropy(logits, self.labels[chosen])
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
        self._finish()
        return steps * self.batch_size / (time.perf_counter() - started)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def summarise(sizes: dict[int, dict[str, list[float]]], recipe: Recipe, rounds: int) -> dict:
    """Return the report."""
    figures = {}
    for size, rates in sizes.items():
        medians = {name: round(float(np.median(rate)), 1) for name, rate in rates.items()}
        ours = medians.pop("ours")
        best = max(medians, key=medians.__getitem__)
        figures[str(size)] = {
            "ours_images_per_s": ours,
            "bare_images_per_s": medians,
            "bare_setting": best,
            "share": round(float(np.median(np.divide(rates["ours"], rates[best]))), 3),
            "patches_times_torchs": round(_gain_of_patches(rates, medians), 3),
        }
    return {
        "batch_size": recipe.batch_size,
        "rounds": rounds,
        "images_per_round": {str(size): steps * recipe.batch_size for size, steps in STEPS.items()},
        "sizes": figures,
        "wanted": {"share": WANTED, "reached": all(row["share"] >= WANTED for row in figures.values())},
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }


def _gain_of_patches(rates: dict[str, list[float]], medians: dict[str, float]) -> float:
    """Return the bare loop's images/s with our convolutions over those with torch's, each in its best setting."""
    with_patches, without = (
        max((name for name in medians if (PATCHES in name) is wanted), key=medians.__getitem__)
        for wanted in (True, False)
    )
    return float(np.median(np.divide(rates[with_patches], rates[without])))


def show(report: dict) -> None:
    """Print the table."""
    for size, row in report["sizes"].items():
        bare = row["bare_images_per_s"][row["bare_setting"]]
        print(
            f"{size:>3} pixels: ours {row['ours_images_per_s']:7.1f} images/s, bare {bare:7.1f} with "
            f"{row['bare_setting']} ({row['share']:.1%}); patches {row['patches_times_torchs']:.2f}x torch's"
        )
    print(f"at least {WANTED:.0%}: {'reached' if report['wanted']['reached'] else 'MISSED'}")


if __name__ == "__main__":
    main()
