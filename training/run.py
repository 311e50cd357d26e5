"""The state of one training: network, averaged weights, optimiser, and the epochs that are done."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.checkpoint import Checkpoint
from training.convolution import use_patches
from training.errors import TrainingError
from training.evaluate.inference import normalised_batches
from training.optimiser import AveragedNetwork, freeze, make_optimiser
from training.parallel import ProcessGroup
from training.recipe import recipe_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from contracts.model import Ancestor
    from training.checkpoint import Weights
    from training.data.training_data import TrainingData
    from training.graphs import RecordedSteps
    from training.recipe import Phase, Recipe

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 256
_GPU_CHECKPOINT_INTERVAL_S = 30.0


class Run:
    """One training in `folder`.

    Every epoch ends with a checkpoint on processors. On a GPU, whose epochs can be shorter than the writing takes, one
    follows the last by half a minute.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: TrainingData,
        network: nn.Module,
        *,
        architecture: str,
        ancestor: Ancestor | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Begin with the first phase.

        Raises:
            TrainingError: the processes cannot share a batch equally.
        """
        self.recipe, self.folder, self.data = recipe, folder, data
        self.architecture, self.ancestor = architecture, ancestor
        self.group = group or ProcessGroup(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.device = self.group.device
        if recipe.batch_size % self.group.processes:
            raise TrainingError(
                f"a batch of {recipe.batch_size} cannot be parted equally among {self.group.processes} processes: "
                "pass a --batch-size that can"
            )
        self.bf16 = _uses_bf16(recipe.precision, self.device)
        self.records_steps = recipe.cuda_graphs and self.device.type == "cuda" and self.group.processes == 1
        if recipe.cuda_graphs and not self.records_steps:
            logger.warning("--cuda-graphs needs a GPU and one process: the steps run plainly")
        torch.backends.cudnn.benchmark = True  # of several algorithms for a convolution, the fastest here
        network = network.to(self.device)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedNetwork(network, recipe.average)
        self.network = self.group.share_statistics(network)
        if self.bf16 and self.device.type == "cpu":
            use_patches(self.network)
        self.begun: Weights = {}  # the weights that the phase began with
        self.best_weights: Weights = {}  # the best epoch's, averaged where the recipe averages
        self.phase, self.epoch = 0, 0  # the next epoch to train: its phase, and its number within the phase
        self.history: list[dict[str, float]] = []
        self.environments: list[dict[str, str]] = []  # those that epochs were trained in
        self.run_id = ""  # MLflow's
        self.checkpoint_interval_s = _GPU_CHECKPOINT_INTERVAL_S if self.device.type == "cuda" else 0.0
        self.written_at = -math.inf
        self._held_out_on_device: list[Tensor] = []
        self._prepare_phase()

    @property
    def is_finished(self) -> bool:
        """Return True if every epoch of every phase is done."""
        return self.phase >= len(self.recipe.phases())

    @property
    def current_phase(self) -> Phase:
        """The phase of the next epoch."""
        return self.recipe.phases()[self.phase]

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
        return self.is_finished or time.monotonic() >= self.written_at + self.checkpoint_interval_s

    @property
    def held_out_part(self) -> slice:
        """The held-out images that this process validates on."""
        return slice(self.group.rank, None, self.group.processes)

    def held_out_batches(self) -> Iterable[Tensor]:
        """Return batches (N, 3, H, W) of this process's held-out images, normalised, on the device."""
        batches = normalised_batches(
            self.data.held_out.images[self.held_out_part], self.data.input, self.device, _VALIDATION_BATCH
        )
        if self.device.type != "cuda":
            return batches
        # A GPU has room for all of them, and waits less.
        self._held_out_on_device = self._held_out_on_device or list(batches)
        return self._held_out_on_device

    def kept(self) -> nn.Module:
        """Return the network that a release would hold: the averaged one, unless the recipe averages none."""
        averaged: nn.Module = self.averaged.module
        return averaged if self.recipe.average else self.network

    def begin_phase(self) -> None:
        """Begin the current phase; one that restarts begins with the averaged weights.

        Raises:
            TrainingError: it blends with weights that a checkpoint of earlier code did not keep.
        """
        phase = self.current_phase
        if self.recipe.average:
            if phase.blend and not self.begun:
                raise TrainingError(
                    f"{self.folder} was trained by earlier code, which kept nothing to blend: leave it out"
                )
            self.begun = self.averaged.blended(phase.blend, self.begun)
            if phase.restarts:
                self.network.load_state_dict(self.begun)
                self.averaged.restart()
        self._prepare_phase()

    def end_epoch(self, figures: dict[str, float], environment: dict[str, str] | None = None) -> None:
        """Keep the epoch's figures, and its weights if it is the best; move on to the next one.

        `environment` says in which versions and on what hardware the epoch was trained.
        """
        self.history.append(figures)
        if environment is not None and environment not in self.environments:
            self.environments.append(environment)
        if self.best_epoch == len(self.history):
            self.best_weights = {key: value.clone() for key, value in self.kept().state_dict().items()}
        self.epoch += 1
        if self.epoch >= self.current_phase.epochs:
            self.phase, self.epoch = self.phase + 1, 0

    def checkpoint(self) -> Checkpoint:
        """Return what `restore` goes on from."""
        return Checkpoint(
            recipe=recipe_to_dict(self.recipe),
            phase=self.phase,
            epoch=self.epoch,
            network=self.network.state_dict(),
            averaged=self.averaged.state_dict(),
            optimiser=self.optimiser.state_dict(),
            history=self.history,
            run_id=self.run_id,
            data_sha256=self.data.sha256,
            best=self.best_weights,
            begun=self.begun,
            environments=self.environments,
            ancestor=self.ancestor,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where the checkpoint was written.

        Raises:
            TrainingError: the data has changed since.
        """
        if checkpoint.data_sha256 not in {None, self.data.sha256}:
            raise TrainingError(
                f"the images of {self.recipe.data} are not those that the training in {self.folder} began with: "
                "bring them back, or start again with --output"
            )
        self.phase, self.epoch = checkpoint.phase, checkpoint.epoch
        self.network.load_state_dict(checkpoint.network)
        self.averaged.load_state_dict(checkpoint.averaged)
        self.begun = {key: value.to(self.device) for key, value in checkpoint.begun.items()}
        if self.epoch:  # or the phase is about to begin, with a new one
            self._prepare_phase()
            self.optimiser.load_state_dict(checkpoint.optimiser)
        self.history, self.run_id = checkpoint.history, checkpoint.run_id
        self.best_weights, self.environments = checkpoint.best, checkpoint.environments
        self.ancestor = checkpoint.ancestor

    def _prepare_phase(self) -> None:
        """Make the phase's optimiser, and the network to call, which averages gradients over the processes."""
        phase = self.current_phase
        freeze(self.network, phase)
        self.optimiser = make_optimiser(self.network, phase, self.recipe)
        self.recorded_steps: RecordedSteps | None = None
        self.trained_network: nn.Module = self.network  # lets go of the last phase's wrapper and its hooks
        self.trained_network = self.group.average_gradients(self.network)


def _uses_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
