"""Train a small network on six of CIFAR-10's classes, from scratch, to ask it about the other four (familiar.py).

A run trains until its time is over and continues from its checkpoint the next time, so that it can share a machine.

    python benchmarks/six_classes.py [--seconds 200]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from handlers.preprocess import normalise
from training.data.images import CIFAR10_INPUT, Images, divide, load_training_images

KNOWN = 6  # the first six classes: airplane, automobile, bird, cat, deer, dog
WIDTHS = (32, 64, 128)
EPOCHS, BATCH, RATE, DECAY, SMOOTHING = 16, 128, 0.1, 5e-4, 0.05
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
CHECKPOINT = Path(".gradserve") / "benchmarks" / "six_classes.pt"


class SmallNetwork(nn.Module):
    """Three pairs of 3×3 convolutions, each pair at half the size of the one before; pooling and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        sides = zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.layers = nn.Sequential(
            *(layer for i, (inner, outer) in enumerate(sides) for layer in _pair(inner, outer, i))
        )
        self.fc = nn.Linear(WIDTHS[-1], KNOWN)

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features (N, 128) of `images` (N, 3, 32, 32)."""
        pooled: Tensor = self.layers(images).mean(dim=(2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 6) of `images` (N, 3, 32, 32)."""
        logits: Tensor = self.fc(self.features(images))
        return logits


def _pair(inner: int, outer: int, number: int) -> list[nn.Module]:
    halved: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
    return [
        *(nn.Conv2d(inner, outer, 3, padding=1, bias=False), *halved, nn.BatchNorm2d(outer), nn.ReLU()),
        *(nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()),
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
    chosen = options.parse_args()
    started = time.monotonic()
    training, held_out = known_images()
    images = torch.from_numpy(normalise(training.images, CIFAR10_INPUT))
    labels = torch.from_numpy(training.labels)
    torch.manual_seed(0)
    network = SmallNetwork().to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=DECAY)
    step, seconds, steps = 0, 0.0, EPOCHS * (len(labels) // BATCH)
    if CHECKPOINT.is_file():
        saved = torch.load(CHECKPOINT, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        step, seconds = saved["step"], saved["seconds"]
    network.train()
    while step < steps and time.monotonic() - started < chosen.seconds:
        _train_batch(network, optimiser, images, labels, step=step, steps=steps)
        step += 1
    seconds += time.monotonic() - started
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, CHECKPOINT)
    accuracy = (logits_of(network, held_out.images).argmax(axis=1) == held_out.labels).mean()
    print(f"step {step} of {steps}, {seconds:.0f} s, held-out accuracy {accuracy:.2%}", flush=True)


def _train_batch(
    network: nn.Module, optimiser: torch.optim.SGD, images: Tensor, labels: Tensor, *, step: int, steps: int
) -> None:
    """Train on one batch, mirrored and shifted by up to four pixels; the rate rises for a fifth of the steps."""
    epoch, place = divmod(step, len(labels) // BATCH)
    order = np.random.default_rng(epoch).permutation(len(labels))
    batch = torch.from_numpy(order[place * BATCH : (place + 1) * BATCH])
    rng = np.random.default_rng([epoch, place])
    shift = tuple(int(by) for by in rng.integers(-4, 5, 2))
    shown = images[batch].roll(shift, dims=(2, 3))
    mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)
    shown[mirrored] = shown[mirrored].flip(3)
    for group in optimiser.param_groups:
        group["lr"] = RATE * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
    loss = cross_entropy(
        network(shown.contiguous(memory_format=torch.channels_last)), labels[batch], label_smoothing=SMOOTHING
    )
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
