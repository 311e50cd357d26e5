"""From a trained run, a packed version or an archive to a plan that serves it, under the model's own name."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from contracts.plan import Plan, Release
from control.archive import inspect_archive
from control.errors import ImpossibleMove, NoModel, OtherModel
from control.release.archive_source import keep
from control.release.plan_store import PlanStore, first_plan
from control.stack.running import find_running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from control.archive import Archive

CONTRACT = "contract.json"


@dataclass(frozen=True)
class Served:
    """What is to be served: a run to pack first, a packed version's folder, or an archive; and its model's name."""

    path: Path
    name: str
    is_packed: bool

    @property
    def is_archive(self) -> bool:
        """Return True for a file that TorchServe loads as it is."""
        return self.path.is_file()


def find_served(path: Path) -> Served:
    """Return what lies at `path`; of a run that was packed since it was trained, its newest version.

    Raises:
        NoModel: it is neither a run, nor a packed version's folder, nor an archive.
        ArchiveError: it is an archive that must not be loaded.
    """
    if path.is_file():
        return Served(path, inspect_archive(path).contract.name, is_packed=True)
    try:
        name = str(json.loads((path / CONTRACT).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoModel(path, f"no archive (.mar), and no folder with a readable {CONTRACT}") from error
    if (path / "reference.json").is_file():
        return Served(path, name, is_packed=True)
    trained = path / "best.pth"
    packed = [folder for folder in path.glob("package-*") if (folder / "reference.json").is_file()]
    newest = max(packed, key=_packed_at, default=None)
    if newest is not None and (not trained.is_file() or _packed_at(newest) >= trained.stat().st_mtime):
        return Served(newest, name, is_packed=True)
    return Served(path, name, is_packed=False)


def free_version(name: str, model_store: Path) -> str:
    """Return the first of 1.0.0, 1.0.1, … of which the model store has no archive."""
    number = 0
    while (model_store / f"{name}-1.0.{number}.mar").exists():
        number += 1
    return f"1.0.{number}"


def refuse_other_model(store: PlanStore, name: str, what: Path) -> None:
    """Return if the plan in force is of the model `name`, or there is none.

    Raises:
        OtherModel: it is another model's; the text says how to serve both.
        PlanUnusable: it cannot be read.
    """
    if store.exists() and (plan := store.read()).model != name:
        raise OtherModel(name, plan.model, serve_command(store.home, name, what))


def serve_command(home: Path, name: str, what: Path) -> str:
    """Return the command that serves `what`, of the model `name`; in a home of its own beside another model's plan."""
    command = f"gradserve serve {shlex.quote(str(what))}"
    store = PlanStore(home)
    if not store.exists() or store.read().model == name:
        return command
    own = f"GRADSERVE_HOME={shlex.quote(f'{os.path.relpath(home)}-{name}')} {command}"
    running = find_running(home)
    return f"{own} --port {(urlsplit(running.gateway).port or 8000) + 1}" if running else own


def next_command(home: Path, archive: Path, name: str, version: str) -> str:
    """Return the command that brings a packed version into traffic: beside the stable version, or as the first one."""
    store = PlanStore(home)
    if find_running(home) and store.exists() and store.read().model == name:
        return f"gradserve deploy {version} --canary 10"
    return serve_command(home, name, archive)


def plan_served(store: PlanStore, path: Path, model_store: Path, say: Callable[[str], None]) -> Plan:
    """Make the archive at `path` the stable version of the plan, and return the plan.

    Raises:
        OtherModel: the plan in force is another model's.
        ImpossibleMove: a stack runs by this plan, and its callers would notice.
        ArchiveError: the archive must not be loaded.
    """
    model_store.mkdir(parents=True, exist_ok=True)
    archive: Archive = keep(inspect_archive(path), model_store)
    name = archive.contract.name
    with store.lock("serve"):
        refuse_other_model(store, name, path)
        release = Release(archive.version, archive.path.name, archive.sha256)
        plan = store.read() if store.exists() else None
        if plan is not None and (plan.stable.archive, plan.stable.sha256) == (release.archive, release.sha256):
            return plan
        if plan is not None and find_running(store.home):
            raise ImpossibleMove(f"a stack runs here: bring it in with gradserve deploy {archive.version} --canary 10")
        new = first_plan(archive.path)
        if plan is not None:  # which a roll-back goes back to
            earlier = (plan.stable, *plan.previous)
            new = replace(new, previous=tuple(found for found in earlier if found.version != release.version))
        say(f"serving {name} {archive.version} from {archive.path.name}")
        return store.write(new, "serve", archive=archive.path.name)


def _packed_at(folder: Path) -> float:
    return (folder / "reference.json").stat().st_mtime
