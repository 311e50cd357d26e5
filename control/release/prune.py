"""Find unused trainings, archives, revisions of the plan and MLflow artifacts.

An archive is used by the plan (also as a version to roll back to), by the folder that `up` packs, and by an alias in
MLflow's registry. A training is used by archives that are kept, by trainings that started from its weights, and by an
alias. Files younger than a number of days, and trainings that run, are kept in any case.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from contracts import model as model_contract
from control.archive import inspect_archive, signature_path
from control.errors import ControlError, NoPlan, RegistryUnusable
from control.release import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from contracts.plan import Plans, Release
    from control.release.plan_store import PlanStore

_DAY_S = 86_400.0
_REVISIONS_KEPT = 20
_RUN_FILES = ("last.pt", "best.pth", "contract.json")
_REVISION = re.compile(r"plan-\d+\.json")


@dataclass(frozen=True)
class Folders:
    """The model store, the folder that `up` packs, and the folder with one folder for each training."""

    model_store: Path
    released: Path
    runs: Path


@dataclass(frozen=True)
class Unused:
    """One unused item; `remove` removes it."""

    kind: Literal["archive", "history", "run", "mlflow"]
    name: str
    bytes: int
    remove: Callable[[], None]


@dataclass(frozen=True)
class Findings:
    """The items that can be removed, and what could not be checked, as sentences."""

    unused: list[Unused]
    skipped: list[str]


@dataclass(frozen=True)
class _References:
    archives: set[str]
    """SHA-256 of archives."""
    runs: set[str]
    """Ids of MLflow runs."""


def find_unused(store: PlanStore, folders: Folders, *, days: float) -> Findings:
    """Return the unused items older than `days`. Hold the plan's lock to remove them.

    Raises:
        PlanUnusable: the plan cannot be read, so the archives that it uses are unknown.
    """
    before = time.time() - days * _DAY_S
    plans = _plans(store)
    skipped: list[str] = []
    known = _References(set(), set())
    try:
        if registry.is_used():
            known = _References(*registry.references())
    except RegistryUnusable as error:
        skipped.append(f"trainings and MLflow: the versions that the registry uses are unknown ({error})")
    known.archives.update(release.sha256 for release in _used(plans))
    known.runs.update(_runs_of(_read_object(folders.released / "contract.json")))
    unused = [*_archives(plans, folders, known, before), *_revisions(store, plans, before)]
    if not skipped:
        unused += _trainings(folders.runs, known, before)
        if registry.is_used():
            found = registry.unused_runs(known.runs, known.archives, before)
            unused += [Unused("mlflow", name, size, remove) for name, size, remove in found]
    return Findings(unused, skipped)


def _plans(store: PlanStore) -> Plans | None:
    try:
        return store.read_all()
    except NoPlan:
        return None


def _used(plans: Plans | None) -> list[Release]:
    """Return the releases that a plan loads, or that a rollback would load."""
    models = plans.models if plans is not None else ()
    return [release for plan in models for release in (*plan.releases(), *plan.previous)]


def _archives(plans: Plans | None, folders: Folders, known: _References, before: float) -> Iterator[Unused]:
    """Yield the unused archives; add the archives that are kept, and their runs, to `known`."""
    released = _read_object(folders.released / "contract.json")
    names = {release.archive for release in _used(plans)}
    names.add(f"{released.get('name')}-{released.get('version')}.mar")
    for path in sorted(folders.model_store.glob("*.mar")):
        try:
            archive = inspect_archive(path)
        except ControlError:
            continue  # not a gradserve archive, or a broken one: left to the operator
        if path.name in names or archive.sha256 in known.archives or path.stat().st_mtime > before:
            known.archives.add(archive.sha256)
            known.runs.update(_runs_of(model_contract.dump(archive.contract)))
        else:
            files = [path, path.with_name(f"{path.name}.sha256"), signature_path(path)]
            yield Unused("archive", str(path), _size(files), partial(_unlink, files))


def _revisions(store: PlanStore, plan: Plans | None, before: float) -> Iterator[Unused]:
    """Yield the old revisions except the last twenty; none while the plan has schema 1, whose rollback needs them."""
    history = store.home / "history"
    if plan is not None and _read_object(store.path).get("schema") == 1:
        return
    paths = sorted(path for path in history.glob("plan-*.json") if _REVISION.fullmatch(path.name))
    old = [path for path in paths[:-_REVISIONS_KEPT] if path.stat().st_mtime <= before]
    if plan is not None:
        old = [path for path in old if path.name != f"plan-{plan.revision:06d}.json"]
    if old:
        name = f"{history}: {old[0].stem} … {old[-1].stem} ({len(old)} revisions)"
        yield Unused("history", name, _size(old), partial(_unlink, old))


def _trainings(runs: Path, known: _References, before: float) -> Iterator[Unused]:
    """Yield the unused folders of trainings; add the runs of those that are kept to `known`."""
    folders = [path for path in sorted(runs.glob("*")) if any((path / name).is_file() for name in _RUN_FILES)]
    candidates = []
    for folder in folders:
        contract = _read_object(folder / "contract.json")
        if _modified_at(folder) > before or _is_in_use(folder):
            known.runs.update(_runs_of(contract))
        else:
            candidates.append((folder, contract))
    for folder, contract in candidates:
        own = next(iter(_runs_of(contract)), None)
        if own in known.runs:  # its ancestors are in `known` by the same contract
            continue
        yield Unused("run", str(folder), _size(folder.rglob("*")), partial(_remove_training, folder))


def _runs_of(contract: dict[str, Any]) -> list[str]:
    """Return the ids of the model's MLflow run and of its ancestors' runs, its own first."""
    found = []
    accepted = contract.get("accepted")
    while isinstance(accepted, dict):
        if run_id := accepted.get("run_id"):
            found.append(str(run_id))
        accepted = (accepted.get("ancestor") or {}).get("accepted")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        contract = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contract if isinstance(contract, dict) else {}


def _modified_at(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.exists())


def _is_in_use(folder: Path) -> bool:
    """Return True while a process trains in the folder, which holds the lock there."""
    try:
        with (folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _remove_training(folder: Path) -> None:
    if _is_in_use(folder):
        raise OSError(f"{folder} is being trained in by now: it stays")
    shutil.rmtree(folder)


def _size(paths: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in paths if path.is_file())


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
