"""The output of `gradserve status`: the plan and the state of each agent, as text or JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import httpx

from contracts import model as model_contract
from contracts import plan as traffic_plan
from control.agents import AgentAnswer, ask_agents
from control.archive import inspect_archive
from control.errors import ControlError, MetricsUnreadable
from control.release import plan_edits
from control.release.gateway_metrics import read_counts
from control.release.plan_store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from contracts.plan import Plan, Plans
    from contracts.status import AgentStatus, VersionStatus

_TOO_OLD_S = 3.0


@dataclass(frozen=True)
class Overview:
    """The content of `gradserve status`.

    Attributes:
        ok: every agent serves a verified stable version.
        plan: the plans of all models; None if they cannot be read.
        plan_error: the reason why the plan cannot be read.
        agents: the answer of each agent.
        gateways: the answer of each gateway, as `ask_gateway` returns it.
        drift: the differences between plan and agents, as sentences.
        counted: the gateways' counts since they started, by version.
        counted_error: the reason why the counts are not known.
    """

    ok: bool
    plan: Plans | None
    plan_error: str | None
    agents: list[AgentAnswer]
    gateways: list[dict[str, Any]]
    drift: list[str]
    counted: dict[str, Any]
    counted_error: str | None

    def dump(self) -> dict[str, Any]:
        """Return the view as JSON-able data."""
        documents = {
            "plan": traffic_plan.dump(self.plan) if self.plan else None,
            "agents": [agent.dump() for agent in self.agents],
        }
        return {field.name: documents.get(field.name, getattr(self, field.name)) for field in fields(self)}


def overview(home: Path, agents: Iterable[str], gateways: Sequence[str], key: str | None) -> Overview:
    """Return the plan, the answers of agents and gateways, their differences and the counts."""
    plan, plan_error = None, None
    try:
        plan = open_store(home).read_all()
    except ControlError as error:
        plan_error = str(error)
    seen = ask_agents(agents)
    counted, counted_error = _counted(gateways, key, plan)
    return Overview(
        ok=bool(seen) and all(agent.serves for agent in seen),
        plan=plan,
        plan_error=plan_error,
        agents=seen,
        gateways=[ask_gateway(url) for url in gateways],
        drift=[line for agent in seen for line in drift(plan, agent)],
        counted=counted,
        counted_error=counted_error,
    )


def _counted(gateways: Sequence[str], key: str | None, plans: Plans | None) -> tuple[dict[str, Any], str | None]:
    """Return the counts by version, or by `MODEL VERSION` if the plan has several models; and what is wrong."""
    several = plans is not None and len(plans.models) > 1
    counted: dict[str, Any] = {}
    try:
        for model in plans.names() if plans is not None and several else (None,):
            counts = read_counts(gateways, key, model)
            for version in counts.versions():
                counted[f"{model} {version}" if model else version] = counts.summary(version)
    except MetricsUnreadable as error:
        return {}, str(error)
    return counted, None


def ask_gateway(url: str) -> dict[str, Any]:
    """Return `url` with `status` and `reasons` of the gateway's /health, or with `error`."""
    try:
        response = httpx.get(f"{url}/health", timeout=3.0, trust_env=False)
        report = response.json()
        return {"url": url, "status": report["status"], "reasons": report["reasons"]}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return {"url": url, "error": f"does not answer ({type(error).__name__})"}
    except (ValueError, KeyError, TypeError):
        return {"url": url, "error": f"does not answer like a gateway (status {response.status_code})"}


def output() -> Console:
    """Return a console on stdout that never cuts a line if stdout is not a terminal."""
    from rich.console import Console  # noqa: PLC0415 (JSON needs none of it)

    return Console(highlight=False, width=None if sys.stdout.isatty() else 100_000)


def columns(*headers: str, show_header: bool = True) -> Table:
    """Return a table with these columns; a narrow terminal folds its cells instead of cutting them."""
    from rich.table import Table  # noqa: PLC0415 (as above)

    table = Table(box=None, padding=(0, 2), show_header=show_header)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def print_overview(view: Overview, *, as_json: bool) -> None:
    """Print the view on stdout."""
    if as_json:
        print(json.dumps(view.dump()))  # noqa: T201 (the command's output)
        return
    console = output()
    for line in [plan_line(plan) for plan in view.plan.models] if view.plan else [f"[red]{view.plan_error}[/red]"]:
        console.print(f"plan      {line}")
    for agent in view.agents:
        console.print(f"agent     {agent.url}  {_agent_line(agent)}")
        if agent.status is None:
            continue
        table = columns("model", "version", "role", "state", "predict", "explain", "waiting", "reason")
        for version in agent.status.versions:
            table.add_row(*_version_row(version))
        console.print(table)
    for gateway in view.gateways:
        console.print(f"gateway   {gateway['url']}  {_gateway_line(gateway)}", soft_wrap=True)
    for name, counted in view.counted.items():
        console.print(f"counted   {name}: {_counted_line(counted)}")
    if view.counted_error:
        console.print(f"counted   [yellow]{view.counted_error}[/yellow]")
    for line in view.drift:
        console.print(f"drift     [yellow]{line}[/yellow]")


def list_versions(home: Path, seen: Iterable[AgentAnswer], model_store: Path) -> list[dict[str, Any]]:
    """Return every version in the plan, on the agents `seen` or in the model store, as JSON-able data."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def entry(model: str, version: str) -> dict[str, Any]:
        blank: dict[str, Any] = {"model": model, "version": version, "role": None, "agents": {}, "archive": None}
        return found.setdefault((model, version), blank)

    plans = None
    with contextlib.suppress(ControlError):
        plans = open_store(home).read_all()
    for plan in plans.models if plans is not None else ():
        for release in plan.releases():
            role = plan_edits.role_of(plan, release.version)
            entry(plan.model, release.version).update(role=role, archive=release.archive)
    for path in sorted(model_store.glob("*.mar")):
        with contextlib.suppress(ControlError):
            archive = inspect_archive(path)
            name = archive.contract.name
            accepted = model_contract.dump(archive.contract)["accepted"]
            entry(name, archive.version).update(archive=path.name, sha256=archive.sha256, accepted=accepted)
    for agent in seen:
        for version in agent.status.versions if agent.status is not None else ():
            entry(version.model, version.version)["agents"][agent.url] = version.state
    return [found[key] for key in sorted(found)]


def print_versions(found: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print the list on stdout."""
    if as_json:
        print(json.dumps(found))  # noqa: T201 (the command's output)
        return
    table = columns("model", "version", "role", "on agents", "archive", "sha256")
    for version in found:
        states = ", ".join(sorted(set(version["agents"].values()))) or "-"
        sha256 = version.get("sha256", "")[:12]
        row = (version["model"], version["version"])
        table.add_row(*row, version["role"] or "-", states, version["archive"] or "-", sha256)
    output().print(table)


def plan_line(plan: Plan) -> str:
    """Return the plan in one line."""
    roles = [f"stable {plan.stable.version}"]
    if plan.canary is not None:
        roles.append(f"canary {plan.canary.version} ({plan.canary.share:g} %)")
    if plan.shadow is not None:
        roles.append(f"shadow {plan.shadow.version}")
    roles += [f"retained {release.version}" for release in plan.retained]
    return f"revision {plan.revision}: {plan.model}, {', '.join(roles)}"


def _agent_line(agent: AgentAnswer) -> str:
    if agent.status is None:
        return f"[red]{agent.error}[/red]"
    server = agent.status.torchserve
    draining = ", draining" if agent.status.draining else ""
    return f"TorchServe {server.state}, {server.restarts} restarts{draining}, observed {agent.age_s:.1f} s ago"


def _gateway_line(gateway: dict[str, Any]) -> str:
    if "error" in gateway:
        return f"[red]{gateway['error']}; pass other addresses by --gateways[/red]"
    colour = {"ok": "green", "unavailable": "red"}.get(gateway["status"], "yellow")
    reasons = f": {'; '.join(gateway['reasons'])}" if gateway["reasons"] else ""
    return f"[{colour}]{gateway['status']}[/{colour}]{reasons}"


def _version_row(version: VersionStatus) -> list[str]:
    predict, explain = version.predict, version.explain
    colour = {"ready": "green", "failed": "red"}.get(version.state, "yellow")
    return [
        version.model,
        version.version,
        version.role,
        f"[{colour}]{version.state}[/{colour}]",
        f"{predict.ready}/{predict.wanted}",
        f"{explain.ready}/{explain.wanted}",
        str((predict.pending or 0) + (explain.pending or 0)),
        version.reason or "",
    ]


def _counted_line(counted: dict[str, Any]) -> str:
    line = f"{counted['requests']} requests, {counted['failed']} failed"
    if counted["p99_ms"] is not None:
        line += f", p99 within {counted['p99_ms']:g} ms"
    if counted["pairs"]:
        line += "; as shadow " + ", ".join(f"{count} {outcome}" for outcome, count in counted["pairs"].items())
    if counted["mean_shift"] is not None:
        line += f", confidence {counted['mean_shift']:+.3f}"
    return line


def drift(plan: Plans | None, agent: AgentAnswer) -> Iterable[str]:
    """Yield each difference between the plan and the agent's status, as a sentence."""
    url, status = agent.url, agent.status
    if status is None:
        return
    if agent.age_s > _TOO_OLD_S:
        yield f"{url} last observed TorchServe {agent.age_s:.0f} s ago"
    if status.plan_error:
        yield f"{url} follows an older plan: {status.plan_error}"
    for entry in status.torchserve.removed_entries:
        yield f"{url} removed an entry from TorchServe that it had not registered: {entry}"
    if plan is None:
        return
    if status.plan_revision not in {None, plan.revision}:
        yield f"{url} is at plan revision {status.plan_revision}, the plan is at {plan.revision}"
    for gateway in status.gateways:
        report = gateway.report
        if report.revision != plan.revision:
            yield f"gateway {report.id} routes by revision {report.revision}, the plan is at {plan.revision}"
    yield from _version_drift(plan, url, status)


def _version_drift(plans: Plans, url: str, status: AgentStatus) -> Iterable[str]:
    states = {(found.model, found.version): found.state for found in status.versions}
    for plan in plans.models:
        for release in plan.releases():
            state = states.pop((plan.model, release.version), "not loaded")
            if state != "ready" and release.workers != 0:
                yield f"{url}: {plan.model} {release.version} is {state}"
    for model, version in states:
        yield f"{url}: {model} {version} is loaded and not in the plan"
