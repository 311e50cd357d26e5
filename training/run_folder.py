"""The folder of a training: its lock, the checkpoint, and the files that follow from the checkpoint.

`last.pt`, the checkpoint, is written first and whole; all else follows from it: `best.pth` (state dict of the best
epoch on the held-out images), `contract.json`, `history.json`, `curves.png`.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from contracts.model import Accepted, Contract, Figures, Provenance
from contracts.model import save as save_contract
from training.checkpoint import write_checkpoint, write_whole
from training.errors import TrainingError
from training.recipe import check_folder, recipe_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from training.parallel import ProcessGroup
    from training.run import Run

FILES = ("best.pth", "contract.json", "history.json", "curves.png")


@contextmanager
def locked_folder(folder: Path, group: ProcessGroup, *, resumes: bool) -> Iterator[None]:
    """Make the folder, and keep other trainings out of it.

    Raises:
        TrainingError: it holds a training already, or none to resume, or another process trains there.
    """
    if not group.is_first:
        yield
        return
    if resumes:
        check_folder(folder, resumes=True)  # or a mistyped folder would be made
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise TrainingError(f"another process trains in {folder}: wait for it, or stop it") from error
    try:
        check_folder(folder, resumes=resumes)
        yield
    finally:
        lock.release()


def write_run(run: Run) -> None:
    """Write the checkpoint, then the files that follow from it; only the first process writes."""
    if not run.group.is_first:
        return
    write_checkpoint(run.checkpoint(), run.folder)
    if run.history:
        _write_files(run)
    run.written_at = time.monotonic()


def _write_files(run: Run) -> None:
    if run.best_weights:
        state = {key: value.float().contiguous() for key, value in run.best_weights.items()}
        write_whole(state, run.folder / "best.pth")
    save_contract(_contract(run), run.folder / "contract.json")
    (run.folder / "history.json").write_text(json.dumps(run.history, indent=1) + "\n", encoding="utf-8")
    _plot_curves(run.history, run.folder / "curves.png")


def _plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss and accuracy of each epoch, on training and held-out images, into the PNG `path`."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((quantity, "training"), (f"validation_{quantity}", "held out")):
            axes.plot(epochs, [figures[key] for figures in history], marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _contract(run: Run) -> Contract:
    provenance = Provenance(
        data_sha256=run.data.sha256,
        training_images=len(run.data.training),
        held_out_images=len(run.data.held_out),
        epochs=len(run.history),
        duration_s=round(run.duration_s, 1),
        processes=run.group.processes,
        environments=tuple(run.environments),
    )
    accepted = Accepted(
        figures=Figures(validation_accuracy=run.best),
        run_id=run.run_id,
        recipe=recipe_to_dict(run.recipe),
        provenance=provenance,
        ancestor=run.ancestor,
    )
    return Contract(
        name=run.recipe.name,
        version="0",  # a version is given when the model is packaged
        classes=run.data.classes,
        input=run.data.input,
        architecture=run.architecture,
        accepted=accepted,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
