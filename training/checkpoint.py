"""The checkpoint of a training: one file, written whole or not at all, from which a resumed training goes on.

A field with a default was added later: a checkpoint of earlier code has none, and is read with the default.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contracts.model import Ancestor, dump_ancestor, parse_ancestor
from training.errors import TrainingError
from training.recipe import CHECKPOINT

if TYPE_CHECKING:
    from pathlib import Path

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on as if it had not been interrupted.

    `phase` and `epoch` count from 0 and name the next epoch to train. `averaged` is the state of `AveragedNetwork`,
    `best` the weights of the best epoch, `begun` the weights that the phase began with.
    """

    recipe: dict[str, Any]
    phase: int
    epoch: int
    network: Weights
    averaged: Weights
    optimiser: dict[str, Any]
    history: list[dict[str, float]]
    run_id: str
    data_sha256: str | None = None
    best: Weights = field(default_factory=dict)  # empty: best.pth has them
    begun: Weights = field(default_factory=dict)
    environments: list[dict[str, str]] = field(default_factory=list)
    ancestor: Ancestor | None = None


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `last.pt` in `folder`, whole or not at all."""
    state = {item.name: getattr(checkpoint, item.name) for item in fields(checkpoint)}
    write_whole(state | {"ancestor": dump_ancestor(checkpoint.ancestor)}, folder / CHECKPOINT)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`, its tensors on the processor.

    Raises:
        TrainingError: the file is damaged, or is no checkpoint that this code knows.
    """
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**state | {"ancestor": parse_ancestor(state.get("ancestor"))})
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): start again with --output") from error


def write_whole(state: dict[str, Any], path: Path) -> None:
    """Save `state` as the file `path`: a process that is killed meanwhile leaves the file that was there."""
    temporary = path.with_name(f".{path.name}.part")
    torch.save(state, temporary)
    temporary.replace(path)
