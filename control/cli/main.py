"""The `gradserve` command.

Importing this module must be fast (`gradserve status` in a shell prompt): each command imports what it needs.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from control.bulk import command as score_command
from control.cli import archive, explain, feedback, keys, models, predict, prune, release, serve, train
from control.cli.release import UNREACHABLE, Agents, Gateways, agent_addresses, gateway_addresses
from control.errors import ControlError
from control.settings import home_directory

app = typer.Typer(
    name="gradserve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object: ok, plan, plan_error, agents (status of each), gateways (health of each), "
        "drift (sentences), counted (by version), counted_error.",
    ),
]


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer's signature
    if value:
        from gateway.settings import VERSION

        typer.echo(f"gradserve {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: FBT002 - a flag, which its callback obeys
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train an image classifier, pack it, serve it with explanations, and move new versions into production."""


@app.command(rich_help_panel="Serve")
def up(
    port: Annotated[
        int, typer.Option(envvar=["PORT", "GATEWAY_PORT"], min=1, max=65535, help="Public port of the gateway.")
    ] = 8000,
    source: Annotated[
        Path, typer.Option(help="Folder with the model to pack and serve if there is no plan yet.")
    ] = Path("model_store/released"),
    mlflow: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--mlflow", help="Also start MLflow's page, on MLFLOW_PORT, else 5000 or a free port.")
    ] = False,
    log_mb: Annotated[
        int,
        typer.Option(envvar="GRADSERVE_LOG_MB", min=4, help="Megabytes of logs kept for each process, in four files."),
    ] = 256,
) -> None:
    """Start all processes on this machine and supervise them until Ctrl-C.

    The command packs the released model if its archive is missing or was built from other bytes, and writes the first
    traffic plan. It starts the agent (with TorchServe) and the gateway. Once a prediction and an explanation work it
    prints `ready:`, the address and two curl lines. A private port that is taken is replaced unless AGENT_*_PORT sets
    it. A process that exits is restarted; if one exits three times within a minute, the command stops everything and
    prints the reason. It also does if the start makes no progress for AGENT_LOAD_TIMEOUT_S and a minute. Logs are
    rotated.

    Example: gradserve up --port 8080

    Exit codes: 0 stopped by a signal, 1 could not run (the reason is printed).
    """
    from control.release.plan_store import PlanStore
    from control.settings import read_agent_settings
    from control.stack.stack import StackOptions, prepare_plan, run_stack

    home, model_store = home_directory(), read_agent_settings().model_store
    run_stack(
        StackOptions(home, port, mlflow, log_mb=log_mb),
        typer.echo,
        lambda: prepare_plan(PlanStore(home), source, model_store, typer.echo),
    )


@app.command(rich_help_panel="Serve")
def prepare(
    source: Annotated[Path, typer.Option(help="Folder with the model to pack.")] = Path("model_store/released"),
) -> None:
    """Pack the released model and write the first traffic plan, as `up` does before it starts the processes.

    The model is packed only if it changed. An existing plan stays in force. Containers run this once before the agent.

    Example: gradserve prepare --source model_store/released
    """
    from control.release.plan_store import PlanStore
    from control.settings import read_agent_settings
    from control.stack.stack import prepare_plan

    prepare_plan(PlanStore(home_directory()), source, read_agent_settings().model_store, typer.echo)


@app.command(rich_help_panel="Serve")
def agent() -> None:
    """Run the agent: start TorchServe, keep it at the traffic plan, and serve `/status` on a private port.

    `gradserve up` and the container image start this command. Its settings are `AGENT_*` (see .env.example). On SIGTERM
    it drains, then stops; a second SIGTERM stops it at once.

    Example: AGENT_WORKERS=2 gradserve agent
    """
    import asyncio
    import logging

    from control.agent.agent import run_agent
    from control.settings import read_agent_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-5s] %(name)s - %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(run_agent(read_agent_settings()))


@app.command(rich_help_panel="Serve")
def status(agents: Agents = "", gateways: Gateways = "", *, as_json: Json = False) -> None:
    """Show the traffic plan, the state of each agent, and the gateways' request counts by version.

    Without --agents and --gateways the command asks those of the `gradserve up` that runs with this GRADSERVE_HOME.

    Example: gradserve status --json

    Exit codes: 0 every agent serves a verified stable version and every gateway answers, 1 an agent does not serve one
    or cannot be reached, 3 the agents serve and a gateway cannot be reached.
    """
    from control.cli.status import overview, print_overview

    key = os.environ.get("GRADSERVE_KEY")
    view = overview(home_directory(), agent_addresses(agents), gateway_addresses(gateways), key)
    print_overview(view, as_json=as_json)
    unreachable = any("error" in gateway for gateway in view.gateways)
    raise typer.Exit(1 if not view.ok else UNREACHABLE if unreachable else 0)


def _read_env_file(path: Path) -> None:
    """Add the settings in `.env` to the environment; a variable that is set there already stays."""
    if path.is_file():
        from dotenv import load_dotenv

        load_dotenv(path, override=False)


serve.register(app)
predict.register(app)
explain.register(app)
score_command.register(app)
feedback.register(app)
train.register(app)
archive.register(app)
prune.register(app)
release.register(app)
models.register(app)
keys.register(app)


def main() -> NoReturn:
    """Run the command; a `ControlError` becomes one sentence on stderr and exit code 1."""
    _read_env_file(Path(".env"))
    try:
        app()
    except ControlError as error:
        typer.echo(f"gradserve: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
