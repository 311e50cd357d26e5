"""Train a classifier: data → network → phases → epochs → validation, in this order.

A new head on a frozen backbone, then the top layers; or everything from scratch.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

from handlers.network import build_network
from training.checkpoint import read_checkpoint
from training.data.training_data import load_training_data, make_loader
from training.epoch import train_epoch, validate
from training.parallel import join_process_group
from training.pretrained import choose_architecture, first_network
from training.recipe import check, extended, recipe_from_dict
from training.run import Run
from training.run_folder import locked_folder, write_run
from training.tracking.recording import recorded
from training.tracking.store import environment

if TYPE_CHECKING:
    from pathlib import Path

    from training.checkpoint import Checkpoint
    from training.parallel import ProcessGroup
    from training.recipe import Recipe

logger = logging.getLogger(__name__)


def train(recipe: Recipe, folder: Path, cache: Path, *, registers: bool = True) -> Path:
    """Train by `recipe` and return the run's folder.

    MLflow gets parameters, metrics and files, and, if `registers`, the best model as a registered version with the
    alias `challenger`. Under `torchrun`, every process calls this.

    Raises:
        TrainingError: the folder holds a run already, is being trained in, or the recipe cannot be followed.
        DataError: the data cannot be loaded.
    """
    check(recipe)
    with join_process_group() as group, locked_folder(folder, group, resumes=False):
        run = begin_run(recipe, folder, cache, group)
        return train_phases(run, registers=registers)


def resume(folder: Path, cache: Path, *, changes: dict[str, Any] | None = None, registers: bool = True) -> Path:
    """Continue the training in `folder` from its last whole epoch, to the result of an unbroken run.

    A finished run is finished again: files and MLflow get what they lack, and cycles that `changes` adds are trained.

    Args:
        folder: the run's.
        cache: where the data set is kept.
        changes: hyper-parameters to go on with; they may add cycles at the end, and change `workers`.
        registers: as in `train`.

    Raises:
        TrainingError: there is no checkpoint, another process trains in the folder, the data has changed, or `changes`
            would change what was done.
    """
    with join_process_group() as group, locked_folder(folder, group, resumes=True):
        checkpoint: Checkpoint = group.from_first(read_checkpoint(folder) if group.is_first else None)
        recipe = extended(recipe_from_dict(checkpoint.recipe), recipe_from_dict(checkpoint.recipe | (changes or {})))
        check(recipe)
        run = restored_run(recipe, checkpoint, folder, cache, group)
        return train_phases(run, registers=registers)


def begin_run(recipe: Recipe, folder: Path, cache: Path, group: ProcessGroup | None = None) -> Run:
    """Return a training before its first epoch: the data, and the network with its first weights.

    Raises:
        TrainingError: the recipe's weights cannot be begun with.
        DataError: the data cannot be loaded.
    """
    data = load_training_data(recipe, cache)
    _warn_of_sizes(recipe, data.input.height)
    architecture = choose_architecture(recipe.architecture, data.input)
    network, ancestor = first_network(recipe, architecture, data)
    return Run(recipe, folder, data, network, architecture=architecture, ancestor=ancestor, group=group)


def restored_run(recipe: Recipe, checkpoint: Checkpoint, folder: Path, cache: Path, group: ProcessGroup) -> Run:
    """Return the training as the checkpoint left it.

    Raises:
        TrainingError: the data has changed since.
        DataError: the data cannot be loaded.
    """
    data = load_training_data(recipe, cache)
    architecture = choose_architecture(recipe.architecture, data.input)
    network = build_network(architecture, len(data.classes))
    run = Run(recipe, folder, data, network, architecture=architecture, group=group)
    run.restore(checkpoint)
    return run


def train_phases(run: Run, *, registers: bool) -> Path:
    """Train the epochs that `run` has left, validate after each, write and record; return the run's folder."""
    with recorded(run, registers=registers) as record:
        write_run(run)  # so that a kill in the first epoch can be resumed, and files that lag behind are mended
        if run.group.is_first:
            logger.info("training in %s; if it is cut off: gradserve train --resume %s", run.folder, run.folder)
            _warn_of_few_steps(len(run.data.training), run.recipe.batch_size)
        record()
        here, augmentation = environment(), None
        while not run.is_finished:
            phase = run.current_phase
            if phase.augmentation != augmentation:
                augmentation = phase.augmentation
                loader, batches = make_loader(run.data, augmentation, run.recipe, run.group)
            if run.epoch == 0:
                run.begin_phase()
            started = time.perf_counter()
            figures = train_epoch(run, loader, batches) | validate(run)
            run.end_epoch(figures | {"epoch_seconds": time.perf_counter() - started}, here)
            _report_epoch(run)
            if run.is_checkpoint_due:
                write_run(run)
                record()
    return run.folder


def _report_epoch(run: Run) -> None:
    if run.group.is_first:
        figures = run.history[-1]
        logger.info(
            "epoch %d: loss %.3f, held-out accuracy %.4f (best %.4f), %.0f images/s",
            len(run.history), figures["loss"], figures["validation_accuracy"], run.best, figures["images_per_s"],
        )  # fmt: skip


def _warn_of_sizes(recipe: Recipe, full: int) -> None:
    for phase in recipe.phases():
        if (last := phase.sizes[-1][1]) not in {0, full}:
            logger.warning(
                "%r ends at %d pixels, and what is served has %d: end its sizes there (or at 0), or leave them out",
                phase.name, last, full,
            )  # fmt: skip


def _warn_of_few_steps(images: int, batch_size: int) -> None:
    if images < batch_size:
        logger.warning(
            "%d images to learn from and a batch of %d: each epoch is one step, in which little is learnt; try "
            "--batch-size %d",
            images, batch_size, max(4, 2 ** int(math.log2(max(1, images // 8)))),
        )  # fmt: skip
