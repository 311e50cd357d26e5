"""The commands that move versions: `deploy`, `promote`, `rollback`, `retire`, `scale`, `versions`, `doctor`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see cli.py)

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.settings import home_directory

if TYPE_CHECKING:
    from control.rollout import Rollout
    from gateway.traffic import Plan

PANEL = "Release"
Json = Annotated[bool, typer.Option("--json", help="Print the resulting plan as one JSON document.")]
Agents = Annotated[
    str,
    typer.Option(
        "--agents", envvar="GATEWAY_AGENTS", help="Status addresses of the agents, with commas.", metavar="URLS"
    ),
]
Version = Annotated[str, typer.Argument(help="A version in the plan; `gradserve versions` lists them.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the `gradserve` command."""
    for command in (deploy, promote, rollback, retire, scale, versions, doctor):
        app.command(rich_help_panel=PANEL)(command)


def agent_addresses(agents: str) -> list[str]:
    """The agents' addresses in `agents`, or this machine's own agent's."""
    own = f"http://127.0.0.1:{os.environ.get('AGENT_PORT') or 9100}"
    return [url.strip().rstrip("/") for url in (agents or own).split(",") if url.strip()]


def deploy(
    what: Annotated[
        str,
        typer.Argument(
            metavar="VERSION | PATH.mar | NAME@ALIAS | NAME/NUMBER",
            help="A version in the model store, a file, or a registered version of MLflow's.",
        ),
    ],
    canary: Annotated[
        float | None, typer.Option(min=0, max=100, help="Give it so many per cent of the calls.", metavar="PERCENT")
    ] = None,
    *,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Mirror calls to it; its answers are only compared.")
    ] = False,
    stable: Annotated[bool, typer.Option("--stable", help="Make it the stable version at once.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Accept what would break callers (classes, input).")] = False,
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Bring a version in: check its archive, load it, verify it on every agent, and only then route to it.

    Without --canary, --shadow or --stable it is loaded and gets no traffic (call it by `version=…`, promote it later).
    If anything is wrong, the version is unloaded, the plan is as before, and the reason is told.

    Example: gradserve deploy 1.0.1 --canary 10

    Exit codes: 0 in force, 1 refused (the reason is printed).
    """
    if sum((canary is not None, shadow, stable)) > 1:
        raise typer.BadParameter("choose one of --canary, --shadow and --stable")
    rollout = _rollout(agents, quiet=as_json)
    _show(rollout.deploy(what, share=canary, shadow=shadow, stable=stable, yes=yes), as_json=as_json)


def promote(
    version: Annotated[str | None, typer.Argument(help="Default: the canary, else the shadow.")] = None,
    *,
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Make a loaded version the stable one. The old stable version stays loaded until it is retired.

    It gets as many workers as the stable version has before it gets the traffic; no request is dropped.
    """
    _show(_rollout(agents, quiet=as_json).promote(version), as_json=as_json)


def rollback(*, agents: Agents = "", as_json: Json = False) -> None:
    """Take the canary (or shadow) out of traffic; without one, go back to the stable version of before.

    Under two seconds while that version is still loaded; otherwise it is loaded and verified first.
    """
    _show(_rollout(agents, quiet=as_json).rollback(), as_json=as_json)


def retire(version: Version, *, agents: Agents = "", as_json: Json = False) -> None:
    """Unload a version that is not stable: no more traffic, then drained, then unregistered. Its archive stays."""
    _show(_rollout(agents, quiet=as_json).retire(version), as_json=as_json)


def scale(
    version: Version,
    workers: Annotated[int, typer.Argument(min=1, help="Prediction workers on each agent.")],
    *,
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Change the number of a version's prediction workers.

    More are ready when this returns. Fewer become true when the version is loaded the next time: TorchServe drops
    what a worker that it takes away has in hand.
    """
    _show(_rollout(agents, quiet=as_json).scale(version, workers), as_json=as_json)


def versions(*, agents: Agents = "", as_json: Json = False) -> None:
    """List every version there is: in the plan, on the agents, in the model store."""
    from control.overview import list_versions, print_versions

    found = list_versions(home_directory(), agent_addresses(agents), _model_store())
    print_versions(found, as_json=as_json)


def doctor(*, agents: Agents = "", as_json: Json = False) -> None:
    """Look for what is wrong: Java, TorchServe, plan, archives, agents, ports, disk, clock, MLflow, keys.

    Exit codes: 0 nothing found that stops serving, 1 something that does; each finding comes with its remedy.
    """
    from control.doctor import examine, print_findings

    findings = examine(home_directory(), agent_addresses(agents), _model_store())
    print_findings(findings, as_json=as_json)
    raise typer.Exit(1 if any(finding.severity == "bad" for finding in findings) else 0)


def _rollout(agents: str, *, quiet: bool) -> Rollout:
    from control.releases import PlanStore
    from control.rollout import Rollout

    def say(line: str) -> None:
        typer.echo(line, err=quiet)

    return Rollout(PlanStore(home_directory()), agent_addresses(agents), _model_store(), say)


def _model_store() -> Path:
    return Path(os.environ.get("AGENT_MODEL_STORE") or "model_store")


def _show(plan: Plan, *, as_json: bool) -> None:
    from control.overview import plan_line
    from gateway import traffic

    typer.echo(json.dumps(traffic.dump(plan)) if as_json else plan_line(traffic.dump(plan)))
