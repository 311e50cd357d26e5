"""The commands that move versions: `deploy`, `promote`, `rollback`, `retire`, `scale`, `versions`, `doctor`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.archive import load_trusted_keys
from control.settings import home_directory, local_url, trusted_key_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.plan import Plan
    from control.release.rollout import Rollout

PANEL = "Release"
UNREACHABLE = 3
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the resulting plan as one JSON object (revision, model, stable, canary, shadow, retained); "
        "progress goes to stderr.",
    ),
]
VersionsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print a JSON array. Each entry has version, role, agents (its state on each), archive, and for an "
        "archive in the model store sha256 and accepted (the figures of its contract).",
    ),
]
FindingsJson = Annotated[
    bool,
    typer.Option("--json", help="Print a JSON array of findings: severity (good, note or bad), about, text, remedy."),
]
Agents = Annotated[
    str,
    typer.Option(
        "--agents", envvar="GATEWAY_AGENTS", help="Status addresses of the agents, separated by commas.", metavar="URLS"
    ),
]
Gateways = Annotated[
    str,
    typer.Option(
        "--gateways",
        envvar="GRADSERVE_GATEWAYS",
        help="Addresses of the gateways, separated by commas. If they require a key, set GRADSERVE_KEY (scope read).",
        metavar="URLS",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", envvar="GRADSERVE_MODEL", help="Model of the version. Default: the plan's default model."),
]
AllowMissing = Annotated[
    bool,
    typer.Option("--allow-missing", help="Continue with the agents that answer, at least one."),
]
Version = Annotated[str, typer.Argument(help="A version in the plan; `gradserve versions` lists them.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `gradserve` command."""
    for command in (deploy, promote, rollback, retire, scale, versions, doctor):
        app.command(rich_help_panel=PANEL)(command)


def agent_addresses(agents: str) -> list[str]:
    """Return the agents' addresses: `agents`, else the agent of the running stack, else this machine's."""
    from control.stack.running import find_running

    running = find_running(home_directory())
    own = local_url(os.environ.get("AGENT_HOST", ""), os.environ.get("AGENT_PORT") or 9100)
    return _resolved(_addresses(agents or (running.agent if running else own)))


def _resolved(urls: list[str]) -> list[str]:
    """Return the addresses with each host name replaced by what it resolves to: a name may stand for several replicas.

    A name that cannot be resolved stays, so that it is reported as an agent that does not answer.
    """
    import asyncio

    from gateway.inference.discovery import Discovery
    from gateway.kubernetes.errors import NotInCluster

    found = []
    for url in urls:
        try:
            discovery = Discovery([url])
        except (ValueError, NotInCluster) as error:
            raise typer.BadParameter(str(error)) from error
        addresses = discovery.listed() if discovery.is_fixed else asyncio.run(discovery.find())
        discovery.close()
        found += [address.url for address in addresses] or [url]
    return found


def gateway_addresses(gateways: str) -> list[str]:
    """Return the gateways' addresses: `gateways`, else the gateway of the running stack, else this machine's."""
    from control.stack.running import find_running

    running = find_running(home_directory())
    port = os.environ.get("PORT") or os.environ.get("GATEWAY_PORT") or 8000
    own = local_url(os.environ.get("GATEWAY_HOST", ""), port)
    return _addresses(gateways or (running.gateway if running else own))


def _addresses(urls: str) -> list[str]:
    found = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
    if not found:
        raise typer.BadParameter(f"{urls!r} names no address: write like http://localhost:8000, several with commas")
    return found


def deploy(
    what: Annotated[
        str,
        typer.Argument(
            metavar="VERSION | PATH.mar | URL | NAME@ALIAS | NAME/NUMBER",
            help="A version in the model store, a file, a URL that agents fetch from too, or one in MLflow's registry.",
        ),
    ],
    canary: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Make it the canary with this share of the requests.", metavar="PERCENT"),
    ] = None,
    *,
    shadow: Annotated[
        bool,
        typer.Option(
            "--shadow", help="Make it the shadow: requests are mirrored to it, and its answers are only compared."
        ),
    ] = False,
    stable: Annotated[bool, typer.Option("--stable", help="Make it the stable version at once.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Accept changes that would break callers (classes, input).")
    ] = False,
    gate: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of labelled images, one folder for each class, on which it must pass.",
        ),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="With --gate: percentage points of accuracy that it may lose against the stable version.",
        ),
    ] = 0.5,
    model: Model = None,
    allow_missing: AllowMissing = False,
    gateways: Gateways = "",
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Deploy a version: check its archive, load it, verify it on every agent, and only then route to it.

    Without --canary, --shadow or --stable it is loaded and gets no traffic (call it by `version=…`, promote it later).
    If a step fails, the command unloads the version, restores the plan and prints the reason.

    With --gate the new and the stable version first classify the folder's images, through the gateway. Files that are
    no images are skipped and named.

    Every agent must load it. An agent that does not answer is named every five seconds. With --allow-missing the
    command continues without it after five seconds; that agent follows the plan when it is back.

    A URL (https, s3 and others) that ends in .mar is written to the plan with the archive's SHA-256: agents whose model
    store lacks the archive fetch it from there, and refuse other bytes.

    With --model of a model that the plan does not serve yet, the archive PATH.mar adds that model: its version becomes
    the model's stable version, and callers name the model by `model=…`.

    Example: gradserve deploy 1.0.1 --canary 10

    Example: gradserve deploy model_store/photos-1.0.0.mar --model photos

    Exit codes: 0 in force, 1 refused (the reason is printed).
    """
    if sum((canary is not None, shadow, stable)) > 1:
        raise typer.BadParameter("choose one of --canary, --shadow and --stable")
    from control.release.accuracy_gate import Gate

    operations = rollout(agents, model, quiet=as_json, allow_missing=allow_missing)
    if is_new_model(model):
        if canary is not None or shadow or gate is not None:
            raise typer.BadParameter(
                "a new model's first version is its stable one: leave out --canary, --shadow, --gate"
            )
        _show(operations.add_model(what), as_json=as_json)
        return
    address, key = gateway_addresses(gateways)[0], os.environ.get("GRADSERVE_KEY")
    judge = Gate(gate, address, key, max_drop / 100, model=model) if gate else None
    _show(operations.deploy(what, share=canary, shadow=shadow, stable=stable, yes=yes, gate=judge), as_json=as_json)


def promote(
    version: Annotated[str | None, typer.Argument(help="Default: the canary, else the shadow.")] = None,
    *,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Compare it with the stable version for a while, then promote it or roll it back."),
    ] = False,
    window: Annotated[float, typer.Option(min=1, help="With --auto: seconds of comparison.")] = 600.0,
    requests: Annotated[
        int,
        typer.Option(min=1, help="With --auto: requests (of a shadow: pairs) that each version needs for a verdict."),
    ] = 500,
    significance: Annotated[
        float, typer.Option(min=1e-9, max=0.5, help="With --auto: largest p-value at which a difference counts.")
    ] = 0.01,
    slower: Annotated[
        float, typer.Option(min=1, help="With --auto: allowed factor on the stable version's p99 latency.")
    ] = 1.5,
    disagreement: Annotated[
        float,
        typer.Option(
            min=0.001, max=99, help="With --auto: percentage of a shadow's pairs that may have another class."
        ),
    ] = 10.0,
    model: Model = None,
    allow_missing: AllowMissing = False,
    gateways: Gateways = "",
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Make a loaded version the stable one. The old stable version stays loaded until it is retired.

    Before it gets the traffic it gets as many workers as the stable version; no request is dropped. Every agent must
    have it ready, or with --allow-missing those that answer.

    With --auto the gateways' counts of the canary (else the shadow) are compared with those of the stable version. The
    version is rolled back if it fails more often than the stable version (Fisher's exact test), if more than 1 % of its
    answers take longer than the stable version's p99 times --slower (exact binomial test), or, as a shadow, if it names
    another class more often than --disagreement (exact binomial test); before the end of --window only if p is below
    0.001. Otherwise it is promoted at the end. The verdict is printed and written to the audit log with its figures.

    Example: gradserve promote --auto --window 300

    Exit codes: 0 promoted, 1 not possible, 3 rolled back, 4 no verdict (too few requests, or the plan was changed).
    """
    if not auto:
        _show(rollout(agents, model, quiet=as_json, allow_missing=allow_missing).promote(version), as_json=as_json)
        return
    from control.release.auto_promote import Window, promote_or_roll_back
    from control.release.plan_store import open_store
    from control.release.verdict import Limits

    limits = Limits(requests, significance, slower, disagreement / 100)
    watched = Window(gateway_addresses(gateways), os.environ.get("GRADSERVE_KEY"), window)
    store, say = open_store(home_directory(), model), _say(quiet=as_json)
    operations = rollout(agents, model, quiet=as_json, allow_missing=allow_missing)
    verdict, plan = promote_or_roll_back(operations, store, version, window=watched, limits=limits, say=say)
    _show(plan, as_json=as_json)
    raise typer.Exit({"promote": 0, "rollback": 3, "none": 4}[verdict.decision])


def rollback(
    *, model: Model = None, allow_missing: AllowMissing = False, agents: Agents = "", as_json: Json = False
) -> None:
    """Take the canary (or shadow) out of traffic; without one, go back to the previous stable version.

    A second rollback goes one stable version further back, never to the version that was left. While that version is
    still loaded a rollback takes less than two seconds and does not wait for agents that do not answer. Otherwise the
    version is loaded and verified first, by every agent, or with --allow-missing by those that answer.

    Example: gradserve rollback --allow-missing
    """
    _show(rollout(agents, model, quiet=as_json, allow_missing=allow_missing).rollback(), as_json=as_json)


def retire(
    version: Version,
    *,
    model: Model = None,
    allow_missing: AllowMissing = False,
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Unload a version that is not stable: stop its traffic, drain it, unregister it. Its archive stays.

    Example: gradserve retire 1.0.0
    """
    _show(rollout(agents, model, quiet=as_json, allow_missing=allow_missing).retire(version), as_json=as_json)


def scale(
    version: Version,
    workers: Annotated[int, typer.Argument(min=0, help="Prediction workers on each agent; 0 unloads the version.")],
    *,
    model: Model = None,
    allow_missing: AllowMissing = False,
    agents: Agents = "",
    as_json: Json = False,
) -> None:
    """Change the number of a version's prediction workers.

    Added workers are ready when this returns. Fewer workers take effect when the version is loaded the next time,
    because TorchServe drops the requests of a worker that it removes. With 0 workers the version is unloaded and stays
    in the plan: so a model that is seldom asked needs no memory until it is scaled up again.

    Example: gradserve scale 1.0.1 3
    """
    _show(rollout(agents, model, quiet=as_json, allow_missing=allow_missing).scale(version, workers), as_json=as_json)


def versions(*, agents: Agents = "", as_json: VersionsJson = False) -> None:
    """List all versions in the plan, on the agents and in the model store.

    Example: gradserve versions --json

    Exit codes: 0 every agent answered, 3 one cannot be reached (it is named on stderr; the rest is listed).
    """
    from control.agents import ask_agents
    from control.cli.status import list_versions, print_versions

    seen = ask_agents(agent_addresses(agents))
    print_versions(list_versions(home_directory(), seen, model_store()), as_json=as_json)
    missing = [agent for agent in seen if agent.status is None]
    for agent in missing:
        typer.echo(f"agent {agent.url} {agent.error}: its versions are not listed", err=True)
    raise typer.Exit(UNREACHABLE if missing else 0)


def doctor(*, gateways: Gateways = "", agents: Agents = "", as_json: FindingsJson = False) -> None:
    """Check Java, TorchServe, plan, archives, agents, gateway, ports, disk, clock, MLflow and keys.

    Example: gradserve doctor --json

    Exit codes: 0 no problem that stops serving, 1 such a problem (for example a gateway or agent that cannot be
    reached). Each finding comes with its remedy.
    """
    from control.cli.doctor import examine, print_findings

    findings = examine(home_directory(), agent_addresses(agents), gateway_addresses(gateways), model_store())
    print_findings(findings, as_json=as_json)
    raise typer.Exit(1 if any(finding.severity == "bad" for finding in findings) else 0)


def is_new_model(model: str | None) -> bool:
    """Return True if the plan in force does not serve `model`, or a plan in Kubernetes does not exist yet.

    On one machine `gradserve up` writes the first plan.
    """
    from control.release.plan_store import is_in_cluster, open_store

    store = open_store(home_directory(), model)
    if not store.exists():
        return model is not None and is_in_cluster()
    return model is not None and not store.serves_model()


def rollout(agents: str, model: str | None, *, quiet: bool, allow_missing: bool) -> Rollout:
    """Return the operations on the plan of `model`, by default of the default model."""
    from control.release.plan_store import open_store
    from control.release.rollout import Rollout

    store, say = open_store(home_directory(), model), _say(quiet=quiet)
    trusted = load_trusted_keys(trusted_key_files())
    return Rollout(store, agent_addresses(agents), model_store(), say, allow_missing=allow_missing, trusted=trusted)


def _say(*, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line of progress: to stdout, or if `quiet` to stderr."""
    return lambda line: typer.echo(line, err=quiet)


def model_store() -> Path:
    """Return the folder with the archives."""
    return Path(os.environ.get("AGENT_MODEL_STORE") or "model_store")


def _show(plan: Plan, *, as_json: bool) -> None:
    from contracts import plan as traffic_plan
    from control.cli.status import plan_line

    typer.echo(json.dumps(traffic_plan.dump_plan(plan)) if as_json else plan_line(plan))
