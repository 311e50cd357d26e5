"""A training's epochs, files and best model in MLflow, while it goes on and at its end."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from training.recipe import CHECKPOINT
from training.run_folder import FILES, write_run
from training.tracking.recorder import Recorder
from training.tracking.store import environment, warn_on_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from training.run import Run

logger = logging.getLogger(__name__)


@contextmanager
def recorded(run: Run, *, registers: bool) -> Iterator[Callable[[], None]]:
    """Yield the function that sends what MLflow lacks; after the body, send the rest and close MLflow's runs.

    Where the body ends without an exception, the files are sent, and the best model is registered if `registers`.
    Only the first process records.
    """
    if not run.group.is_first:
        yield lambda: None
        return
    recorder = _recorder(run)

    def record() -> None:
        _record(run, recorder)

    status = "KILLED"
    try:
        yield record
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        _close(run, recorder, status, registers=registers)


def _recorder(run: Run) -> Recorder:
    facts = {
        "data_sha256": run.data.sha256,
        "training_images": len(run.data.training),
        "held_out_images": len(run.data.held_out),
        "processes": run.group.processes,
    }
    tags = environment() | {"folder": run.folder.name}
    parts = {"training": run.data.training, "validation": run.data.held_out}
    recorder = Recorder(f"{run.recipe.name}-{run.folder.name}", run.recipe, facts, tags, parts)
    recorder.run_id = run.run_id
    return recorder


def _record(run: Run, recorder: Recorder) -> bool:
    reached = recorder.update(run.history)
    if run.run_id != recorder.run_id:
        run.run_id = recorder.run_id
        write_run(run)
    return reached


def _close(run: Run, recorder: Recorder, status: str, *, registers: bool) -> None:
    is_whole = status == "FINISHED"
    files = [run.folder / name for name in FILES if is_whole]
    # A training that was cut off stands in the middle of an epoch: its checkpoint stays that of the last whole one.
    reached = _record(run, recorder) if is_whole else recorder.update(run.history)
    is_recorded = reached and recorder.finish(status, files)
    if is_recorded and is_whole and registers:
        is_recorded = warn_on_failure(lambda: _register(run, recorder))
    if not is_recorded and (run.folder / CHECKPOINT).exists():
        logger.warning("MLflow lacks a part: gradserve train --resume %s sends it", run.folder)


def _register(run: Run, recorder: Recorder) -> None:
    from training.tracking.registry import CHALLENGER, register  # noqa: PLC0415 - MLflow's models take seconds to import

    if recorder.registered_epoch() == str(run.best_epoch):
        return  # by a training that was resumed after its end
    version = register(run.folder, run.run_id)
    recorder.mark_registered(str(run.best_epoch))
    logger.info("registered as models:/%s/%s, alias %s", run.recipe.name, version, CHALLENGER)
