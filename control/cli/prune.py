"""The `prune` command: list unused files, and remove them with `--yes`."""
# ruff: noqa: PLC0415 (imports only what it needs, see main.py)

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.errors import ControlError
from control.settings import home_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from control.release.prune import Findings, Unused

_UNDER_LOCK = ("archive", "history")


def register(app: typer.Typer) -> None:
    """Add the command to the `gradserve` command."""
    app.command(rich_help_panel="Models")(prune)


def prune(
    days: Annotated[float, typer.Option(min=0, help="Keep everything younger than this many days.")] = 30.0,
    *,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the unused files; without this nothing is removed.")
    ] = False,
    source: Annotated[Path, typer.Option(help="Folder that `up` packs; its archive is kept.")] = Path(
        "model_store/released"
    ),
    runs: Annotated[Path, typer.Option(help="Folder with one folder for each training.")] = Path(".gradserve/training"),
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: unused (an array of kind, name, bytes), bytes (of all), skipped (sentences), "
            "removed (true or false).",
        ),
    ] = False,
) -> None:
    """Show the trainings, archives, old revisions of the plan and MLflow artifacts that nothing refers to.

    The command keeps everything younger than --days; the archives that the plan names, also those to roll back to;
    versions with an alias in MLflow's registry (champion, previous, challenger, your own); the trainings that made a
    kept archive, and the trainings that those started from; running trainings; the last 20 revisions. MLflow keeps the
    figures of every run.

    Only the plan in GRADSERVE_HOME is read: if another stack uses the same model store, prune by hand.

    Example: gradserve prune --days 7, then the same with --yes

    Exit codes: 0 shown or removed, 1 something could not be read or removed (it is named on stderr).
    """
    from control.cli.release import model_store
    from control.release.plan_store import open_store
    from control.release.prune import Folders, find_unused

    store = open_store(home_directory())
    folders = Folders(model_store(), source, runs)
    failures: dict[str, str] = {}
    if yes:
        with store.lock("prune"):
            found = find_unused(store, folders, days=days)
            failures |= _remove(item for item in found.unused if item.kind in _UNDER_LOCK)
        failures |= _remove(item for item in found.unused if item.kind not in _UNDER_LOCK)
        removed = [item.name for item in found.unused if item.name not in failures]
        store.note("prune", removed=removed, failed=list(failures.values()))
    else:
        found = find_unused(store, folders, days=days)
    if as_json:
        _print_json(found, removed=yes)
    else:
        _print(found, "removed" if yes else f"can be removed: gradserve prune --days {days:g} --yes")
    for failure in (*found.skipped, *failures.values()):
        typer.echo(f"WARNING: {failure}", err=True)
    raise typer.Exit(1 if found.skipped or failures else 0)


def _remove(unused: Iterable[Unused]) -> dict[str, str]:
    """Remove each item and return the failures: the item's name and a sentence."""
    failures = {}
    for item in unused:
        try:
            item.remove()
        except (ControlError, OSError) as error:
            failures[item.name] = f"{item.name} could not be removed completely: {error}"
    return failures


def _print_json(found: Findings, *, removed: bool) -> None:
    rows = [{"kind": item.kind, "name": item.name, "bytes": item.bytes} for item in found.unused]
    total = sum(item.bytes for item in found.unused)
    typer.echo(json.dumps({"unused": rows, "bytes": total, "skipped": found.skipped, "removed": removed}))


def _print(found: Findings, what: str) -> None:
    from control.cli.status import columns, output

    table = columns("kind", "MB", "name")
    for item in found.unused:
        table.add_row(item.kind, f"{item.bytes / 1e6:,.1f}", item.name)
    if found.unused:
        output().print(table)
    typer.echo(f"{sum(item.bytes for item in found.unused) / 1e6:,.1f} MB {what}")
