"""Trains the classifier: a new head on a frozen backbone, then the top layers; or everything from scratch."""

from __future__ import annotations

import logging
import math
import pickle
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from training.data.augment import EpochBatches, training_loader
from training.data.device_augment import DeviceLoader
from training.errors import TrainingError
from training.parallel import join_process_group
from training.recipe import CHECKPOINT, Recipe, check, check_folder, extended, recipe_from_dict
from training.run import FILES, Run
from training.tracking.recorder import Recorder
from training.tracking.store import environment, warn_on_failure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from training.parallel import ProcessGroup
    from training.recipe import Augmentation
    from training.run import Loader

logger = logging.getLogger(__name__)


def train(recipe: Recipe, folder: Path, cache: Path, *, registers: bool = True) -> Path:
    """Trains by `recipe` and returns the run's folder.

    MLflow gets parameters, metrics and files, and, where `registers`, the best model as a registered version with the
    alias `challenger`. Under `torchrun`, every process calls this.

    Raises:
        TrainingError: the folder holds a run already, is being trained in, or the recipe cannot be followed.
        DataError: the data cannot be had.
    """
    check(recipe)
    with join_process_group() as team, _alone(folder, team):
        if team.is_first:
            check_folder(folder, resumes=False)
        return _drive(Run(recipe, folder, cache, team), registers=registers)


def resume(folder: Path, cache: Path, *, changes: dict[str, Any] | None = None, registers: bool = True) -> Path:
    """Continues the training in `folder` from its last whole epoch, to the result of an unbroken run.

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
    with join_process_group() as team:
        if team.is_first:
            check_folder(folder, resumes=True)
        with _alone(folder, team):
            state = team.from_first(_checkpoint(folder) if team.is_first else None)
            begun = recipe_from_dict(state["recipe"])
            recipe = extended(begun, recipe_from_dict(state["recipe"] | (changes or {})))
            check(recipe)
            run = Run(recipe, folder, cache, team, begins=False)
            run.restore(state)
            return _drive(run, registers=registers)


@contextmanager
def _alone(folder: Path, team: ProcessGroup) -> Iterator[None]:
    """Makes the folder, and keeps other trainings out of it."""
    if not team.is_first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout as error:
            raise TrainingError(f"another process trains in {folder}: wait for it, or stop it") from error
        yield


def _checkpoint(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{folder}/last.pt cannot be read ({error}): start again with --output") from error
    return state


def _drive(run: Run, *, registers: bool) -> Path:
    if not run.team.is_first:
        for _ in _epochs(run):
            pass  # another process writes and records
        return run.folder
    recorder = _recorder(run)
    status = "KILLED"
    try:
        run.write()  # a kill in the first epoch can be resumed too; and what one left behind the checkpoint is mended
        logger.info("training in %s; if it is cut off: gradserve train --resume %s", run.folder, run.folder)
        _warn_of_few_steps(len(run.training_images), run.recipe.batch_size)
        _record(run, recorder)
        for _ in _epochs(run):
            _record(run, recorder)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        _close(run, recorder, status, registers=registers)
    return run.folder


def _record(run: Run, recorder: Recorder) -> bool:
    reached = recorder.update(run.history)
    if run.run_id != recorder.run_id:
        run.run_id = recorder.run_id
        run.write()
    return reached


def _close(run: Run, recorder: Recorder, status: str, *, registers: bool) -> None:
    is_whole = status == "FINISHED"
    files = [run.folder / name for name in FILES if is_whole]
    # A training that was cut off stands in the middle of an epoch: its checkpoint stays that of the last whole one.
    reached = _record(run, recorder) if is_whole else recorder.update(run.history)
    recorded = reached and recorder.finish(status, files)
    if recorded and is_whole and registers:
        recorded = warn_on_failure(lambda: _register(run, recorder))
    if not recorded and (run.folder / CHECKPOINT).exists():
        logger.warning("MLflow lacks a part: gradserve train --resume %s sends it", run.folder)


def _warn_of_few_steps(images: int, batch_size: int) -> None:
    if images < batch_size:
        logger.warning(
            "%d images to learn from and a batch of %d: each epoch is one step, in which little is learnt; try "
            "--batch-size %d",
            images, batch_size, max(4, 2 ** int(math.log2(max(1, images // 8)))),
        )  # fmt: skip


def _recorder(run: Run) -> Recorder:
    facts = {
        "data_sha256": run.data_sha256,
        "training_images": len(run.training_images),
        "held_out_images": len(run.held_out),
        "processes": run.team.processes,
    }
    tags = environment() | {"folder": run.folder.name}
    parts = {"training": run.training_images, "validation": run.held_out}
    recorder = Recorder(f"{run.recipe.name}-{run.folder.name}", run.recipe, facts, tags, parts)
    recorder.run_id = run.run_id
    return recorder


def _register(run: Run, recorder: Recorder) -> None:
    from training.tracking.registry import CHALLENGER, register  # noqa: PLC0415 - MLflow's models take seconds to import

    if recorder.registered_epoch() == str(run.best_epoch):
        return  # by a training that was resumed after its end
    version = register(run.folder, run.run_id)
    recorder.mark_registered(str(run.best_epoch))
    logger.info("registered as models:/%s/%s, alias %s", run.recipe.name, version, CHALLENGER)


def _epochs(run: Run) -> Iterator[None]:
    """Train all epochs, and yield after each checkpoint."""
    here = environment()
    augmentation = None
    while not run.is_finished:
        phase = run.recipe.phases()[run.phase]
        if phase.augmentation != augmentation:
            augmentation = phase.augmentation
            loader, batches = _loader(run, augmentation)
        started = time.perf_counter()
        figures = run.train_epoch(loader, batches) | run.validate()
        if here not in run.environments:
            run.environments.append(here)
        run.end_epoch(figures | {"epoch_seconds": time.perf_counter() - started})
        if run.team.is_first:
            logger.info(
                "epoch %d: loss %.3f, held-out accuracy %.4f (best %.4f), %.0f images/s",
                len(run.history), figures["loss"], figures["validation_accuracy"], run.best, figures["images_per_s"],
            )  # fmt: skip
            if run.is_checkpoint_due:
                run.write()
                yield


def _loader(run: Run, augmentation: Augmentation) -> tuple[Loader, EpochBatches]:
    """Return what feeds the training, on a GPU from its own memory, and the order of the images."""
    recipe, team = run.recipe, run.team
    if run.device.type == "cuda" or augmentation.pixmix:
        batches = EpochBatches(
            len(run.training_images), recipe.batch_size, recipe.seed, rank=team.rank, processes=team.processes
        )
        loader = DeviceLoader(
            run.training_images, run.input, augmentation, batches, seed=recipe.seed, device=run.device
        )
        return loader, batches
    return training_loader(
        run.training_images,
        run.input,
        augmentation,
        batch_size=recipe.batch_size,
        workers=recipe.workers,
        seed=recipe.seed,
        rank=team.rank,
        processes=team.processes,
    )
