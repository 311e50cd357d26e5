"""Trains the classifier: a new head on a frozen backbone, then the top layers; or everything from scratch.

A run is a folder: `last.pt` (checkpoint of every
epoch), `best.pth` (state dict of the best epoch on the held-out images), `contract.json`, `history.json`, `curves.png`.
MLflow gets copies.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from handlers.contract import Contract
from handlers.contract import save as save_contract
from training.augment import training_loader
from training.curves import plot_curves
from training.data import divide, load_training_images
from training.errors import TrainingError
from training.inference import predict_logits
from training.pretrained import choose_architecture, pretrained_network
from training.recipe import Phase, Recipe, check, rate_factor, recipe_from_dict, recipe_to_dict
from training.tracking import Tracker, environment, survive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch.utils.data import DataLoader

    from training.augment import EpochBatches

logger = logging.getLogger(__name__)

_Tensors = tuple[Tensor, ...] | list[Tensor]


class Run:
    """One training: network, averaged weights, optimiser and progress, in one folder."""

    def __init__(self, recipe: Recipe, folder: Path, cache: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = _uses_bf16(recipe.precision, self.device)
        images, self.input = load_training_images(recipe.data, cache)
        self.training_images, self.held_out = divide(
            images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed
        )
        self.architecture = choose_architecture(recipe.architecture, self.input)
        network = pretrained_network(recipe, self.architecture, len(images.classes))
        network = network.to(self.device)
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.network, multi_avg_fn=self._average, use_buffers=True)
        self.phase, self.epoch = 0, 0  # the next epoch to train: its phase, and its number within the phase
        self.optimiser = self._make_optimiser()
        self.history: list[dict[str, float]] = []
        self.best = -1.0
        self.run_id = ""

    @property
    def is_finished(self) -> bool:
        """Whether every epoch of every phase is done."""
        return self.phase >= len(self.recipe.phases())

    def train_epoch(self, loader: DataLoader[tuple[Tensor, Tensor]], batches: EpochBatches) -> dict[str, float]:
        """Trains one epoch and returns its figures: loss, accuracy, seconds, images per second, rate, picture size."""
        phase = self.recipe.phases()[self.phase]
        self._freeze(phase)
        batches.epoch = len(self.history)
        size = self._picture_size(phase)
        steps = len(batches) * phase.epochs
        started = time.perf_counter()
        loss_sum = correct = seen = 0.0
        rate = 0.0
        with tqdm(loader, desc=f"{phase.name} {self.epoch + 1}/{phase.epochs} {size}px", mininterval=1.0) as bar:
            for index, (images, labels) in enumerate(bar):
                rate = phase.rate * rate_factor(self.epoch * len(batches) + index, steps, self.recipe.warm_up)
                loss, hits = self._step(images, labels, size, rate)
                seen += len(labels)
                loss_sum += loss * len(labels)
                correct += hits
                speed = seen / (time.perf_counter() - started)
                bar.set_postfix(loss=f"{loss_sum / seen:.3f}", acc=f"{correct / seen:.3f}", img_s=f"{speed:.0f}")
        if not math.isfinite(loss_sum):
            raise TrainingError(f"the loss is {loss_sum}: lower --rate (it was {phase.rate}) or lengthen the warm-up")
        seconds = time.perf_counter() - started
        return {
            "loss": loss_sum / seen,
            "accuracy": correct / seen,
            "seconds": seconds,
            "images_per_s": seen / seconds,
            "rate": rate,
            "size": float(size),
        }

    def validate(self) -> dict[str, float]:
        """Loss and accuracy of the averaged weights on the held-out images, at the contract's size."""
        logits = predict_logits(self.kept(), self.held_out.images, self.input, device=self.device, bf16=self.bf16)
        labels = torch.from_numpy(self.held_out.labels)
        return {
            "validation_loss": float(cross_entropy(logits, labels)),
            "validation_accuracy": float((logits.argmax(1) == labels).double().mean()),
        }

    def kept(self) -> nn.Module:
        """The network that a release would hold: averaged weights, or the last ones where the recipe averages none."""
        return self.averaged.module if self.recipe.average else self.network

    def advance(self) -> None:
        """Moves on to the next epoch; a new phase gets a new optimiser."""
        self.epoch += 1
        if self.epoch >= self.recipe.phases()[self.phase].epochs:
            self.phase, self.epoch = self.phase + 1, 0
            if not self.is_finished:
                self.optimiser = self._make_optimiser()

    def save(self) -> None:
        """Writes the checkpoint `last.pt`, whole or not at all."""
        state = {
            "recipe": recipe_to_dict(self.recipe),
            "phase": self.phase,
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
            "best": self.best,
            "run_id": self.run_id,
        }
        _write_whole(state, self.folder / "last.pt")

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where the checkpoint was written."""
        self.phase, self.epoch = state["phase"], state["epoch"]
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        if not self.is_finished:
            self.optimiser = self._make_optimiser()
            self.optimiser.load_state_dict(state["optimiser"])
        self.history, self.best, self.run_id = state["history"], state["best"], state["run_id"]

    def _step(self, images: Tensor, labels: Tensor, size: int, rate: float) -> tuple[float, float]:
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if images.shape[-1] != size:
            images = interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(images)
        loss = cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        if self.recipe.average:
            self.averaged.update_parameters(self.network)
        return float(loss.detach()), float((logits.detach().argmax(1) == labels).sum())

    def _average(self, averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        """Moves the averaged weights towards the current ones; faster at the start, to forget the random beginning."""
        decay = min(self.recipe.average, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def _make_optimiser(self) -> torch.optim.SGD:
        phase = self.recipe.phases()[self.phase]
        trained = [parameter for name, parameter in self.network.named_parameters() if phase.trains(name)]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        recipe = self.recipe
        return torch.optim.SGD(
            groups,
            lr=phase.rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def _freeze(self, phase: Phase) -> None:
        """Puts what `phase` trains into training mode; the rest keeps its weights and its batch-norm statistics."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(phase.trains(name))
        for name, module in self.network.named_modules():
            if not list(module.children()):
                module.train(phase.trains(name))

    def _picture_size(self, phase: Phase) -> int:
        done = self.epoch / phase.epochs
        return next(size for start, size in reversed(self.recipe.sizes) if done >= start) or self.input.height


def train(recipe: Recipe, folder: Path, cache: Path, *, registers: bool = True) -> Path:
    """Trains by `recipe` and returns the run's folder.

    MLflow gets parameters, metrics and files, and, where `registers`, the best model as a registered version with the
    alias `challenger`.

    Raises:
        TrainingError: the folder holds a run already, or the recipe cannot be followed.
        DataError: the data cannot be had.
    """
    if (folder / "last.pt").exists():
        raise TrainingError(
            f"{folder} holds a training already: continue it with --resume {folder}, or pass another --output"
        )
    check(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    return _drive(Run(recipe, folder, cache), registers=registers)


def resume(folder: Path, cache: Path, *, registers: bool = True) -> Path:
    """Continues the training in `folder` from its last whole epoch, to the result of an unbroken run.

    Raises:
        TrainingError: there is no checkpoint.
    """
    if not (folder / "last.pt").exists():
        raise TrainingError(f"{folder} holds no checkpoint (last.pt): start it with --output {folder}")
    state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    run = Run(recipe_from_dict(state["recipe"]), folder, cache)
    run.restore(state)
    return _drive(run, registers=registers)


def _drive(run: Run, *, registers: bool) -> Path:
    recipe = run.recipe
    tracker = Tracker(f"{recipe.name}-{run.folder.name}", run.run_id)
    if not run.run_id:
        run.run_id = tracker.run_id
        tracker.params(_flat(recipe_to_dict(recipe)))
        tracker.tags(environment() | {"folder": run.folder.name})
    status = "KILLED"
    try:
        for figures in _epochs(run):
            tracker.metrics(figures, step=len(run.history))
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if status == "FINISHED":
            for name in ("best.pth", "contract.json", "history.json", "curves.png"):
                tracker.artifact(run.folder / name)
            if registers and tracker.is_open:
                survive(lambda: _register(run))
        tracker.finish(status)
    return run.folder


def _register(run: Run) -> None:
    from training.registry import CHALLENGER, register  # noqa: PLC0415 - MLflow's models take seconds to import

    version = register(run.folder, run.run_id)
    logger.info("registered as models:/%s/%s, alias %s", run.recipe.name, version, CHALLENGER)


def _epochs(run: Run) -> Iterator[dict[str, float]]:
    recipe = run.recipe
    loader, batches = training_loader(
        run.training_images,
        run.input,
        recipe.augmentation,
        batch_size=recipe.batch_size,
        workers=recipe.workers,
        seed=recipe.seed,
    )
    while not run.is_finished:
        figures = run.train_epoch(loader, batches) | run.validate()
        run.history.append(figures)
        if figures["validation_accuracy"] > run.best:
            run.best = figures["validation_accuracy"]
            state = {key: value.float().contiguous() for key, value in run.kept().state_dict().items()}
            _write_whole(state, run.folder / "best.pth")
        run.advance()
        run.save()
        _write_summary(run)
        logger.info(
            "epoch %d: loss %.3f, held-out accuracy %.4f (best %.4f), %.0f images/s",
            len(run.history), figures["loss"], figures["validation_accuracy"], run.best, figures["images_per_s"],
        )  # fmt: skip
        yield figures


def _write_summary(run: Run) -> None:
    recipe = run.recipe
    contract = Contract(
        name=recipe.name,
        version="0",  # a version is given when the model is packaged
        classes=run.training_images.classes,
        input=run.input,
        architecture=run.architecture,
        accepted={"validation_accuracy": run.best, "run_id": run.run_id, "recipe": recipe_to_dict(recipe)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    save_contract(contract, run.folder / "contract.json")
    (run.folder / "history.json").write_text(json.dumps(run.history, indent=1) + "\n", encoding="utf-8")
    plot_curves(run.history, run.folder / "curves.png")


def _uses_bf16(precision: str, device: torch.device) -> bool:
    if precision not in {"auto", "bf16", "fp32"}:
        raise TrainingError(f"unknown precision {precision!r}: use auto, bf16 or fp32")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def _write_whole(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    torch.save(state, temporary)
    temporary.replace(path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
