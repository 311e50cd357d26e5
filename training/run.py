"""One training's state: what an epoch does with it, and how it is written down and read again.

A run is a folder. `last.pt`, the checkpoint, is written first and whole; all else follows from it: `best.pth` (state
dict of the best epoch on the held-out images), `contract.json`, `history.json`, `curves.png`. On processors every epoch
ends with a checkpoint. On a GPU, whose epochs can be shorter than the writing takes, one follows the last by half a
minute.
"""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from contracts.model import Accepted, Ancestor, Contract, Figures, Provenance, dump_ancestor, parse_ancestor
from contracts.model import save as save_contract
from handlers.network import build_network
from training.convolution import use_patches
from training.curves import plot_curves
from training.data.images import divide, load_training_images
from training.errors import TrainingError
from training.evaluate.inference import compute_logits, normalised_batches
from training.parallel import ProcessGroup
from training.pretrained import ancestor, check_split, choose_architecture, located, pretrained_network
from training.recipe import Phase, Recipe, rate_factor, recipe_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch.utils.data import DataLoader

    from training.data.augment import EpochBatches
    from training.data.device_augment import DeviceLoader

    Loader = DataLoader[tuple[Tensor, Tensor]] | DeviceLoader

logger = logging.getLogger(__name__)

FILES = ("best.pth", "contract.json", "history.json", "curves.png")

_VALIDATION_BATCH = 256
_GPU_CHECKPOINT_INTERVAL_S = 30.0
_AVERAGED_EVERY = 4  # steps: at each one it would take a thirtieth of the time, and the average would be the same

_Tensors = tuple[Tensor, ...] | list[Tensor]


class Run:
    """One training: network, averaged weights, optimiser and progress, in one folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, cache: Path, team: ProcessGroup | None = None, *, begins: bool = True
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.folder = folder
        self.team = team or ProcessGroup(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.device = self.team.device
        if recipe.batch_size % self.team.processes:
            raise TrainingError(
                f"a batch of {recipe.batch_size} cannot be parted equally among {self.team.processes} processes: "
                "pass a --batch-size that can"
            )
        self.bf16 = _uses_bf16(recipe.precision, self.device)
        torch.backends.cudnn.benchmark = True  # of several algorithms for a convolution, the fastest here
        images, self.input = load_training_images(recipe.data, cache)
        self.data_sha256 = images.sha256()
        self.training_images, self.held_out = divide(
            images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed
        )
        self.architecture = choose_architecture(recipe.architecture, self.input)
        self.ancestor: Ancestor | None = None  # what the first weights were, where they are of a model of ours
        if begins:
            _compare_sizes(recipe, self.input.height)
            begins_with = located(recipe)
            check_split(begins_with, self.data_sha256)
            network = pretrained_network(begins_with, self.architecture, images.classes)
            self.ancestor = ancestor(begins_with)
        else:
            network = build_network(self.architecture, len(images.classes))  # `restore` fills it
        network = network.to(self.device)
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.network, multi_avg_fn=self._average, use_buffers=True)
        self.network = self.team.share_statistics(self.network)
        if self.bf16 and self.device.type == "cpu":
            use_patches(self.network)
        self.begun: dict[str, Tensor] = {}  # the weights that the phase began with
        self.phase, self.epoch = 0, 0  # the next epoch to train: its phase, and its number within the phase
        self._enter_phase()
        self.best_weights: dict[str, Tensor] = {}  # the best epoch's, averaged where the recipe averages
        self.checkpoint_interval_s = _GPU_CHECKPOINT_INTERVAL_S if self.device.type == "cuda" else 0.0
        self._written_at = -math.inf
        self._held_out_batches: list[Tensor] = []
        self.history: list[dict[str, float]] = []
        self.environments: list[dict[str, str]] = []  # those that epochs were trained in
        self.run_id = ""

    @property
    def is_finished(self) -> bool:
        """Return True if every epoch of every phase is done."""
        return self.phase >= len(self.recipe.phases())

    @property
    def best_epoch(self) -> int:
        """The first epoch, counted from 1, that no other surpasses on the held-out images; 0 before there is one."""
        accuracies = [figures["validation_accuracy"] for figures in self.history]
        return accuracies.index(max(accuracies)) + 1 if accuracies else 0

    @property
    def best(self) -> float:
        """The accuracy that the best epoch reached on the held-out images."""
        return self.history[self.best_epoch - 1]["validation_accuracy"] if self.history else -1.0

    @property
    def duration_s(self) -> float:
        """Seconds of all epochs so far, validation included; what a kill threw away does not count."""
        # A checkpoint of earlier code has the seconds of training alone.
        return sum(figures.get("epoch_seconds", figures["seconds"]) for figures in self.history)

    @property
    def is_checkpoint_due(self) -> bool:
        """Return True if the last checkpoint is old enough, or the training has ended."""
        return self.is_finished or time.monotonic() >= self._written_at + self.checkpoint_interval_s

    def train_epoch(self, loader: Loader, batches: EpochBatches) -> dict[str, float]:
        """Trains one epoch and returns its figures: loss, accuracy, seconds, images per second, rate, image size."""
        phase = self.recipe.phases()[self.phase]
        if self.epoch == 0:
            self._begin_phase(phase)
        self._freeze(phase)
        batches.epoch = len(self.history)
        size = self._image_size(phase)
        radius = self.recipe.sam_radius if self.epoch / phase.epochs >= self.recipe.sam_from else 0.0
        steps = len(batches) * phase.epochs
        started = shown = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # of losses, hits and images
        rate = 0.0
        title = f"{phase.name} {self.epoch + 1}/{phase.epochs} {size}px"
        with tqdm(loader, desc=title, mininterval=1.0, disable=not self.team.is_first) as bar:
            for index, (images, labels) in enumerate(bar):
                rate = phase.rate * rate_factor(self.epoch * len(batches) + index, steps, phase.warm_up)
                sums += self._step(images, labels, size, rate, radius)
                if self.recipe.average and ((index + 1) % _AVERAGED_EVERY == 0 or index + 1 == len(batches)):
                    self.averaged.update_parameters(self.network)
                if (now := time.perf_counter()) > shown + 1:  # to read them at each step would hold a GPU up
                    shown = now
                    bar.set_postfix(_figures(sums, self.team.processes / (now - started)), refresh=False)
        loss, accuracy, seen = _means(self.team.total(sums))
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}: lower --rate (it was {phase.rate}) or lengthen the warm-up")
        seconds = time.perf_counter() - started
        return {
            "loss": loss,
            "accuracy": accuracy,
            "seconds": seconds,
            "images_per_s": seen / seconds,
            "rate": rate,
            "size": float(size),
        }

    def validate(self) -> dict[str, float]:
        """Loss and accuracy of the averaged weights on the held-out images, at the contract's size.

        Each process looks at its part of them.
        """
        part = slice(self.team.rank, None, self.team.processes)
        batches: Iterable[Tensor] = normalised_batches(
            self.held_out.images[part], self.input, self.device, _VALIDATION_BATCH
        )
        if self.device.type == "cuda":  # has room for them, and is waited for less
            batches = self._held_out_batches = self._held_out_batches or list(batches)
        logits = compute_logits(self.kept(), batches, device=self.device, bf16=self.bf16)
        labels = torch.from_numpy(self.held_out.labels[part])
        loss = cross_entropy(logits, labels, reduction="sum")
        sums = torch.stack(
            [loss.double(), (logits.argmax(1) == labels).sum().double(), torch.tensor(float(len(labels)))]
        )
        loss_mean, accuracy, _ = _means(self.team.total(sums.to(self.device)))
        return {"validation_loss": loss_mean, "validation_accuracy": accuracy}

    def kept(self) -> nn.Module:
        """The network that a release would hold: averaged weights, or the last ones where the recipe averages none."""
        return self.averaged.module if self.recipe.average else self.network

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Keep the epoch's figures, and its weights if it is the best; move on to the next one."""
        self.history.append(figures)
        if self.best_epoch == len(self.history):
            self.best_weights = {key: value.clone() for key, value in self.kept().state_dict().items()}
        self.epoch += 1
        if self.epoch >= self.recipe.phases()[self.phase].epochs:
            self.phase, self.epoch = self.phase + 1, 0

    def write(self) -> None:
        """Writes the checkpoint `last.pt`, whole or not at all, then what follows from it."""
        state = {
            "recipe": recipe_to_dict(self.recipe),
            "data_sha256": self.data_sha256,
            "phase": self.phase,
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best_weights,
            "begun": self.begun,
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
            "environments": self.environments,
            "ancestor": dump_ancestor(self.ancestor),
            "run_id": self.run_id,
        }
        _write_whole(state, self.folder / "last.pt")
        if self.history:
            self._write_files()
        self._written_at = time.monotonic()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where the checkpoint was written.

        Raises:
            TrainingError: the data is not what it was then.
        """
        if state.get("data_sha256", self.data_sha256) != self.data_sha256:  # earlier code wrote none
            raise TrainingError(
                f"the images of {self.recipe.data} are not those that the training in {self.folder} began with: "
                "bring them back, or start again with --output"
            )
        self.phase, self.epoch = state["phase"], state["epoch"]
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.begun = {key: value.to(self.device) for key, value in state.get("begun", {}).items()}
        if self.epoch:  # or the phase is about to begin, with a new one
            self._enter_phase()
            self.optimiser.load_state_dict(state["optimiser"])
        self.history, self.run_id = state["history"], state["run_id"]
        self.best_weights = state.get("best", {})  # likewise, and what it had is in best.pth
        self.environments = state.get("environments", [])  # earlier code wrote none
        self.ancestor = parse_ancestor(state.get("ancestor"))  # likewise

    def _write_files(self) -> None:
        recipe = self.recipe
        if self.best_weights:
            state = {key: value.float().contiguous() for key, value in self.best_weights.items()}
            _write_whole(state, self.folder / "best.pth")
        provenance = Provenance(
            data_sha256=self.data_sha256,
            training_images=len(self.training_images),
            held_out_images=len(self.held_out),
            epochs=len(self.history),
            duration_s=round(self.duration_s, 1),
            processes=self.team.processes,
            environments=tuple(self.environments),
        )
        contract = Contract(
            name=recipe.name,
            version="0",  # a version is given when the model is packaged
            classes=self.training_images.classes,
            input=self.input,
            architecture=self.architecture,
            accepted=Accepted(
                figures=Figures(validation_accuracy=self.best),
                run_id=self.run_id,
                recipe=recipe_to_dict(recipe),
                provenance=provenance,
                ancestor=self.ancestor,
            ),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        save_contract(contract, self.folder / "contract.json")
        (self.folder / "history.json").write_text(json.dumps(self.history, indent=1) + "\n", encoding="utf-8")
        plot_curves(self.history, self.folder / "curves.png")

    def _begin_phase(self, phase: Phase) -> None:
        if self.recipe.average:
            self.begun = self._blended(phase.blend)
            if phase.restarts:
                self.network.load_state_dict(self.begun)
                self.averaged.n_averaged.zero_()
        self._enter_phase()

    def _blended(self, share: float) -> dict[str, Tensor]:
        """A copy of the averaged weights, of which `share` are those that the last phase began with."""
        if share and not self.begun:
            raise TrainingError(f"{self.folder} was trained by earlier code, which kept nothing to blend: leave it out")
        return {
            key: torch.lerp(value, self.begun[key], share) if share and value.is_floating_point() else value.clone()
            for key, value in self.averaged.module.state_dict().items()
        }

    def _enter_phase(self) -> None:
        """Makes the phase's optimiser, and what averages its gradients over the processes."""
        phase = self.recipe.phases()[self.phase]
        self._freeze(phase)
        self.optimiser = self._make_optimiser(phase)
        self._trained: nn.Module = self.network  # lets go of the last phase's wrapper and its hooks
        self._trained = self.team.average_gradients(self.network)

    def _step(self, images: Tensor, labels: Tensor, size: int, rate: float, radius: float) -> Tensor:
        """Trains on one batch and returns its sums of losses, hits and images."""
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if images.shape[-1] != size:
            images = interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        images = images.contiguous(memory_format=torch.channels_last)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss, logits = self._backward(images, labels)
        if radius:
            with self._at_the_worst_weights(radius):
                self.optimiser.zero_grad(set_to_none=True)
                self._backward(images, labels)
        self.optimiser.step()
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        hits = (logits.argmax(1) == classes).sum()
        return torch.stack([loss * len(labels), hits, torch.full_like(hits, len(labels))])

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of one batch, and return its loss and logits."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self._trained(images)
        loss = cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        return loss.detach(), logits.detach()

    @contextmanager
    def _at_the_worst_weights(self, radius: float) -> Iterator[None]:
        """Move the weights by `radius` along their gradients, where the loss is about the highest, and back in the end.

        Source: Foret et al. 2020, equation 2, https://arxiv.org/abs/2010.01412
        """
        slopes = [(weight, weight.grad) for weight in self.network.parameters() if weight.grad is not None]
        scale = radius / get_total_norm([gradient for _, gradient in slopes]).clamp_min(1e-12)
        climb = [(weight, gradient * scale) for weight, gradient in slopes]
        with torch.no_grad():
            for weight, step in climb:
                weight.add_(step)
        yield
        with torch.no_grad():
            for weight, step in climb:
                weight.sub_(step)

    def _average(self, averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        """Moves the averaged weights towards the current ones; faster at the start, to forget the random beginning."""
        steps = _AVERAGED_EVERY * int(self.averaged.n_averaged)  # on the processor; reading `count` would hold a GPU up
        decay = min(self.recipe.average, (1 + steps) / (10 + steps)) ** _AVERAGED_EVERY
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def _make_optimiser(self, phase: Phase) -> torch.optim.SGD:
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

    def _image_size(self, phase: Phase) -> int:
        done = self.epoch / phase.epochs
        return next(size for start, size in reversed(phase.sizes) if done >= start) or self.input.height


def _means(sums: Tensor) -> tuple[float, float, float]:
    """Mean loss, share of hits and number of images, of their sums."""
    loss, hits, seen = sums.tolist()
    return loss / seen, hits / seen, seen


def _figures(sums: Tensor, per_s: float) -> dict[str, str]:
    loss, accuracy, seen = _means(sums)
    return {"loss": f"{loss:.3f}", "acc": f"{accuracy:.3f}", "img_s": f"{seen * per_s:.0f}"}


def _compare_sizes(recipe: Recipe, full: int) -> None:
    for phase in recipe.phases():
        if (last := phase.sizes[-1][1]) not in {0, full}:
            logger.warning(
                "%r ends at %d pixels, and what is served has %d: end its sizes there (or at 0), or leave them out",
                phase.name, last, full,
            )  # fmt: skip


def _uses_bf16(precision: str, device: torch.device) -> bool:
    if precision not in {"auto", "bf16", "fp32"}:
        raise TrainingError(f"unknown precision {precision!r}: use auto, bf16 or fp32")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def _write_whole(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    torch.save(state, temporary)
    temporary.replace(path)
