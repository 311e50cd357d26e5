"""The commands of the models in the plan: `models list`, `models default`, `models remove`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.release import Agents, AllowMissing, rollout
from control.settings import home_directory

app = typer.Typer(
    help="List the plan's models, name the default one, remove one.\n\nExample: gradserve models list",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(metavar="MODEL", help="A model in the plan; `gradserve models list` lists them.")]


def register(gradserve: typer.Typer) -> None:
    """Add the group to the `gradserve` command."""
    gradserve.add_typer(app, name="models", rich_help_panel="Release")


@app.command("list")
def list_models() -> None:
    """List the models in the plan with their versions; the default model, which calls without `model=` get, first.

    Example: gradserve models list
    """
    from control.cli.status import plan_line
    from control.release.plan_store import open_store

    plans = open_store(home_directory()).read_all()
    for plan in sorted(plans.models, key=lambda plan: (plan.model != plans.default, plan.model)):
        typer.echo(plan_line(plan) + (" (default)" if plan.model == plans.default else ""))


@app.command("default")
def set_default(model: Name) -> None:
    """Make a model the default one, which calls without `model=` get.

    Example: gradserve models default photos
    """
    from control.release.plan_store import open_store

    store = open_store(home_directory())
    with store.lock(f"default {model}"):
        plans = store.set_default(model)
    typer.echo(f"{model} is the default model, revision {plans.revision}")


@app.command("remove")
def remove(model: Name, *, allow_missing: AllowMissing = False, agents: Agents = "") -> None:
    """Remove a model from the plan, with all its versions: stop its traffic, drain it, unload it. Its archives stay.

    The default model cannot be removed: make another one the default first.

    Example: gradserve models remove photos
    """
    rollout(agents, model, quiet=False, allow_missing=allow_missing).remove_model(model)
