"""Plan a trained run, a packed version or an archive as the stable version, under the model's own name."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from contracts.plan import Plan, Release
from control.archive import inspect_archive
from control.errors import ImpossibleMove, NoModel, OtherModel, PlanUnusable
from control.release.archive_source import copy_to_store
from control.release.plan_store import PlanStore, first_plan
from control.stack.running import find_running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from control.archive import Archive

CONTRACT = "contract.json"


@dataclass(frozen=True)
class ServableModel:
    """A model to serve: a run to pack first, the folder of a packed version, or an archive; with the model's name."""

    path: Path
    name: str
    is_packed: bool

    @property
    def is_archive(self) -> bool:
        """Return True for an archive, which TorchServe loads without packing."""
        return self.path.is_file()


def find_model(path: Path) -> ServableModel:
    """Return the model at `path`; for a run that was packed after its training, its newest version.

    Raises:
        NoModel: `path` is neither a run, nor the folder of a packed version, nor an archive.
        ArchiveError: the archive must not be loaded.
    """
    if path.is_file():
        return ServableModel(path, inspect_archive(path).contract.name, is_packed=True)
    try:
        name = str(json.loads((path / CONTRACT).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoModel(path, f"it is no archive (.mar), and no folder with a readable {CONTRACT}") from error
    if (path / "reference.json").is_file():
        return ServableModel(path, name, is_packed=True)
    trained = path / "best.pth"
    packed = [folder for folder in path.glob("package-*") if (folder / "reference.json").is_file()]
    newest = max(packed, key=_packed_at, default=None)
    if newest is not None and (not trained.is_file() or _packed_at(newest) >= trained.stat().st_mtime):
        return ServableModel(newest, name, is_packed=True)
    return ServableModel(path, name, is_packed=False)


def free_version(name: str, model_store: Path) -> str:
    """Return the first of 1.0.0, 1.0.1, … that has no archive in the model store."""
    number = 0
    while (model_store / f"{name}-1.0.{number}.mar").exists():
        number += 1
    return f"1.0.{number}"


def refuse_other_model(store: PlanStore, name: str, what: Path) -> None:
    """Raise `OtherModel` if the plan in force serves other models than `name`.

    Raises:
        OtherModel: the text says how to serve both models.
        PlanUnusable: the plan cannot be read.
    """
    if store.exists() and name not in (known := store.read_all().names()):
        raise OtherModel(name, ", ".join(known), serve_command(store.home, name, what))


def serve_command(home: Path, name: str, what: Path) -> str:
    """Return the command that serves `what`, of the model `name`, with its own home beside another model's plan."""
    command = f"gradserve serve {shlex.quote(str(what))}"
    planned = _models_in_force(home)
    if not planned or name in planned:
        return command
    own = f"GRADSERVE_HOME={shlex.quote(f'{os.path.relpath(home)}-{name}')} {command}"
    running = find_running(home)
    return f"{own} --port {(urlsplit(running.gateway).port or 8000) + 1}" if running else own


def next_command(home: Path, archive: Path, name: str, version: str) -> str:
    """Return the command that gives a packed version traffic: as a canary if a stack runs, else as stable version."""
    if find_running(home) and name in _models_in_force(home):
        return f"gradserve deploy {version} --canary 10"
    return serve_command(home, name, archive)


def plan_archive(store: PlanStore, path: Path, model_store: Path, say: Callable[[str], None]) -> Plan:
    """Make the archive at `path` the stable version of the plan, and return the plan.

    Raises:
        OtherModel: the plan in force serves another model.
        ImpossibleMove: a stack runs with this plan, and its callers would notice the change.
        ArchiveError: the archive must not be loaded.
    """
    model_store.mkdir(parents=True, exist_ok=True)
    archive: Archive = copy_to_store(inspect_archive(path), model_store)
    name = archive.contract.name
    with store.lock("serve"):
        refuse_other_model(store, name, path)
        store = PlanStore(store.home, name)
        release = Release(archive.version, archive.path.name, archive.sha256)
        plan = store.read() if store.exists() else None
        if plan is not None and (plan.stable.archive, plan.stable.sha256) == (release.archive, release.sha256):
            return plan
        if plan is not None and find_running(store.home):
            raise ImpossibleMove(f"a stack runs with this plan: use gradserve deploy {archive.version} --canary 10")
        new = first_plan(archive.path)
        if plan is not None:  # a rollback goes back to these versions
            previous = (plan.stable, *plan.previous)
            new = replace(new, previous=tuple(old for old in previous if old.version != release.version))
        say(f"serving {name} {archive.version} from {archive.path.name}")
        return store.write(new, "serve", archive=archive.path.name)


def _packed_at(folder: Path) -> float:
    return (folder / "reference.json").stat().st_mtime


def _models_in_force(home: Path) -> tuple[str, ...]:
    """Return the models of the plan in `home`; none without a plan that can be read: then `serve` says what to do."""
    store = PlanStore(home)
    try:
        return store.read_all().names() if store.exists() else ()
    except PlanUnusable:
        return ()
