"""The `serve` command: start the stack with a trained run or an archive."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from control.cli.train import DEFAULT_CACHE, Cache, pack_run
from control.settings import home_directory, read_agent_settings


def register(app: typer.Typer) -> None:
    """Add the command to the `gradserve` command."""
    app.command(rich_help_panel="Serve")(serve)


def serve(
    model: Annotated[
        Path, typer.Argument(metavar="RUN | FOLDER | PATH.mar", help="A trained run, a packed version, or an archive.")
    ],
    port: Annotated[
        int, typer.Option(envvar=["PORT", "GATEWAY_PORT"], min=1, max=65535, help="Public port of the gateway.")
    ] = 8000,
    version: Annotated[
        str | None, typer.Option(help="Name of the version, if a run is packed.", show_default="the next free 1.0.N")
    ] = None,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Serve your own model on this machine, under its own name, until Ctrl-C.

    A run is packed first, unless it was packed after its training. The model becomes the stable version of the plan in
    GRADSERVE_HOME. If that plan serves another model, the command refuses: set another GRADSERVE_HOME.

    Example: gradserve serve .gradserve/training/20260101-120000

    Exit codes: 0 stopped by a signal, 1 could not run (the reason is printed).
    """
    from control.release.plan_store import PlanStore  # noqa: PLC0415 - not for `--help`
    from control.stack.serve import find_model, free_version, plan_archive, refuse_other_model  # noqa: PLC0415
    from control.stack.stack import StackOptions, pack, run_stack  # noqa: PLC0415

    home, model_store = home_directory(), read_agent_settings().model_store
    store, found = PlanStore(home), find_model(model)
    refuse_other_model(store, found.name, model)

    def prepare() -> None:
        path = found.path
        if not found.is_packed:
            path = pack_run(model, version or free_version(found.name, model_store), model_store, cache)
        elif not found.is_archive:
            path = pack(path, model_store)
        plan_archive(store, path, model_store, typer.echo)

    run_stack(StackOptions(home, port), typer.echo, prepare)
