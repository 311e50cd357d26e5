"""Train a network on six of CIFAR-10's classes, from scratch, to ask it about the other four (familiar.py).

Without options it is a small network. It trains until its time is over and continues from its checkpoint the next time,
so that it can share a machine. With a recipe it is the network that is served, which needs a GPU; it continues, too.

    python benchmarks/six_classes.py [--seconds 200]
    python benchmarks/six_classes.py --config training/released.toml --epochs 60 --output RUN
"""

from __future__ import annotations

import argparse
import os
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from handlers.network import build_network
from handlers.preprocess import normalise
from training.checkpoint import read_checkpoint
from training.data.images import CIFAR10_INPUT, Images, divide, load_training_images
from training.data.training_data import TrainingData
from training.recipe import CHECKPOINT as RUNS_CHECKPOINT
from training.recipe import Recipe, recipe_from_dict
from training.run import Run
from training.train import train_phases

KNOWN = 6  # the first six classes: airplane, automobile, bird, cat, deer, dog
WIDTHS = (64, 256, 256)
# Jordan 2024, https://arxiv.org/abs/2404.00498, in batches of 256: the rate falls with the length of a batch.
EPOCHS, BATCH, RATE, MOMENTUM, DECAY, SMOOTHING = 6, 256, 0.375, 0.85, 1.3e-3, 0.1
SMALL = 24  # pixels of each side in the first half of the training, which is then nearly twice as fast
SHIFT = 2  # pixels by which training images are moved at most, in each direction
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
CHECKPOINT = Path(".gradserve") / "benchmarks" / "six_classes.pt"
SAVE_EVERY_S = 120.0


class SmallNetwork(nn.Module):
    """A fixed whitening layer, three pairs of 3×3 convolutions, pooling and one linear layer.

    Source: Jordan 2024, section 3, https://arxiv.org/abs/2404.00498; here the last pooling is a mean, as in a ResNet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2).requires_grad_(requires_grad=False)
        sides = zip((24, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.layers = nn.Sequential(nn.GELU(), *(layer for inner, outer in sides for layer in _pair(inner, outer)))
        self.fc = nn.Linear(WIDTHS[-1], KNOWN)

    def whiten(self, images: Tensor) -> None:
        """Let the first layer make the 2×2 patches of `images` (N, 3, 32, 32) uncorrelated and of equal variance."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whitening.weight.data[:] = torch.cat([filters, -filters])
        self.whitening.bias.data.zero_()  # type: ignore[union-attr]

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features (N, 256) of `images` (N, 3, 32, 32)."""
        pooled: Tensor = self.layers(self.whitening(images)).mean(dim=(2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 6) of `images` (N, 3, 32, 32)."""
        logits: Tensor = self.fc(self.features(images))
        return logits


def _pair(inner: int, outer: int) -> list[nn.Module]:
    return [
        *(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outer), nn.GELU()),
        *(nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.GELU()),
    ]


def known_images() -> tuple[Images, Images]:
    """Return the images of the six classes to train on and those held out, one in ten."""
    images, _ = load_training_images("cifar10", CACHE)
    chosen = np.flatnonzero(images.labels < KNOWN)
    known = Images(images.images[chosen], images.labels[chosen], images.classes[:KNOWN])
    return divide(known, subset=0, validation=0.1, seed=0)


def main() -> None:
    """Train for the given time and save a checkpoint."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=1e9)
    options.add_argument("--config", type=Path, help="recipe of the network that is served")
    options.add_argument("--epochs", type=int, help="instead of the recipe's")
    options.add_argument("--output", type=Path, default=Path(".gradserve") / "benchmarks" / "six_classes")
    options.add_argument("--cuda-graphs", action="store_true")
    chosen = options.parse_args()
    if chosen.config:
        recipe = recipe_from_dict(tomllib.loads(chosen.config.read_text(encoding="utf-8")))
        epochs = chosen.epochs or recipe.epochs
        train_served_network(replace(recipe, name="six", epochs=epochs, cuda_graphs=chosen.cuda_graphs), chosen.output)
        return
    started = time.monotonic()
    training, held_out = known_images()
    labels = torch.from_numpy(training.labels)
    images = np.pad(training.images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), "reflect")
    torch.manual_seed(0)
    network = SmallNetwork().to(memory_format=torch.channels_last)
    network.whiten(torch.from_numpy(normalise(training.images[:5000], CIFAR10_INPUT)))
    learnt = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = torch.optim.SGD(learnt, RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    step, before, steps = 0, 0.0, EPOCHS * (len(labels) // BATCH)
    if CHECKPOINT.is_file():
        saved = torch.load(CHECKPOINT, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        step, before = saved["step"], saved["seconds"]
    network.train()
    saved_at = started
    while step < steps and time.monotonic() - started < chosen.seconds:
        _train_batch(network, optimiser, images, labels, step=step, steps=steps)
        step += 1
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            saved_at = time.monotonic()
            _save(network, optimiser, step, before + saved_at - started)
            print(f"step {step} of {steps}, {before + saved_at - started:.0f} s", flush=True)
    seconds = before + time.monotonic() - started
    _save(network, optimiser, step, seconds)
    accuracy = (logits_of(network, held_out.images).argmax(axis=1) == held_out.labels).mean()
    print(f"step {step} of {steps}, {seconds:.0f} s, held-out accuracy {accuracy:.2%}", flush=True)


def train_served_network(recipe: Recipe, folder: Path) -> None:
    """Train by `recipe` on the six classes in `folder`, or continue there."""
    training, held_out = known_images()
    data = TrainingData(training, held_out, CIFAR10_INPUT, training.sha256())
    torch.manual_seed(recipe.seed)
    run = Run(recipe, folder, data, build_network("resnet18_small", KNOWN), architecture="resnet18_small")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / RUNS_CHECKPOINT).exists():
        run.restore(read_checkpoint(folder))
    train_phases(run, registers=False)
    print(f"{len(run.history)} epochs, {run.duration_s:.0f} s, best held-out accuracy {run.best:.2%}")


def _save(network: nn.Module, optimiser: torch.optim.SGD, step: int, seconds: float) -> None:
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "seconds": seconds}
    part = CHECKPOINT.with_suffix(".part")
    torch.save(state, part)
    part.replace(CHECKPOINT)


def _train_batch(
    network: nn.Module, optimiser: torch.optim.SGD, images: np.ndarray, labels: Tensor, *, step: int, steps: int
) -> None:
    """Train on one batch of padded images, moved and mirrored; the rate rises for a fifth of the steps."""
    epoch, place = divmod(step, len(labels) // BATCH)
    order = np.random.default_rng(epoch).permutation(len(labels))
    batch = order[place * BATCH : (place + 1) * BATCH]
    rng = np.random.default_rng([epoch, place])
    rows, columns = (rng.integers(0, 2 * SHIFT + 1, (BATCH, 1)) + np.arange(32) for _ in range(2))
    mirrored = (batch + epoch) % 2 == 1  # each image in every second epoch
    columns[mirrored] = columns[mirrored, ::-1]
    shown = images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    for group in optimiser.param_groups:
        group["lr"] = RATE * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
    pixels = torch.from_numpy(normalise(shown, CIFAR10_INPUT)).contiguous(memory_format=torch.channels_last)
    if step < steps // 2:
        pixels = interpolate(pixels, size=(SMALL, SMALL), mode="bilinear", antialias=True)
    loss = cross_entropy(network(pixels), labels[torch.from_numpy(batch)], label_smoothing=SMOOTHING)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def logits_of(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the logits (N, 6) of `images` (N, 32, 32, 3) uint8."""
    network.eval()
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(normalise(images[start : start + 500], CIFAR10_INPUT)))
            for start in range(0, len(images), 500)
        ]
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    main()
