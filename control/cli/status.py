"""What `gradserve status` shows: the plan beside what each agent sees, for people or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx

from contracts import model as model_contract
from contracts import plan as traffic_plan
from control.archive import inspect_archive
from control.errors import ControlError, MetricsUnreadable
from control.release import plan_edits
from control.release.gateway_metrics import read_counts
from control.release.plan_store import PlanStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

_TOO_OLD_S = 3.0


def overview(home: Path, agents: Iterable[str], gateways: Sequence[str], key: str | None) -> dict[str, Any]:
    """Plan, agents, gateways, where they differ, and what the gateways counted since they started, by version.

    `ok` when every agent serves a verified stable version.
    """
    plan, plan_error = None, None
    try:
        plan = PlanStore(home).read()
    except ControlError as error:
        plan_error = str(error)
    seen = ask_agents(agents)
    return {
        "ok": bool(seen) and all(serves(agent) for agent in seen),
        "plan": traffic_plan.dump(plan) if plan else None,
        "plan_error": plan_error,
        "agents": seen,
        "gateways": [ask_gateway(url) for url in gateways],
        "drift": [line for agent in seen for line in drift(plan, agent)],
        **_counted(gateways, key),
    }


def _counted(gateways: Sequence[str], key: str | None) -> dict[str, Any]:
    try:
        counts = read_counts(gateways, key)
    except MetricsUnreadable as error:
        return {"counted": {}, "counted_error": str(error)}
    return {"counted": {version: counts.summary(version) for version in counts.versions()}, "counted_error": None}


def ask_agent(url: str) -> dict[str, Any]:
    """What the agent at `url` says, with `url` and `age_s`; or `url` and `error`."""
    try:
        with httpx.Client(timeout=3.0, trust_env=False) as client:
            response = client.get(f"{url}/status")
            response.raise_for_status()
            status = response.json()
        return {"url": url, "age_s": round(max(0.0, time.time() - status["observed_at"]), 1), **status}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return {"url": url, "error": f"does not answer ({type(error).__name__})"}
    except (ValueError, KeyError, TypeError):
        return {"url": url, "error": "answers something else than a status"}


def ask_agents(urls: Iterable[str]) -> list[dict[str, Any]]:
    """Return what each agent says, as `ask_agent` does; they are asked at the same time."""
    asked = list(urls)
    with ThreadPoolExecutor(max(1, len(asked))) as threads:
        return list(threads.map(ask_agent, asked))


def ask_gateway(url: str) -> dict[str, Any]:
    """Return `url` with the gateway's `status` and `reasons` as its /health tells them, or with `error`."""
    try:
        response = httpx.get(f"{url}/health", timeout=3.0, trust_env=False)
        report = response.json()
        return {"url": url, "status": report["status"], "reasons": report["reasons"]}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return {"url": url, "error": f"does not answer ({type(error).__name__})"}
    except (ValueError, KeyError, TypeError):
        return {"url": url, "error": f"answers something else than a gateway ({response.status_code})"}


def output() -> Console:
    """Return a console on stdout that cuts nothing: where no terminal reads it, lines are as long as they are."""
    from rich.console import Console  # noqa: PLC0415 (JSON needs none of it)

    return Console(highlight=False, width=None if sys.stdout.isatty() else 100_000)


def columns(*headers: str, show_header: bool = True) -> Table:
    """Return a table with these columns, whose cells are folded rather than cut in a narrow terminal."""
    from rich.table import Table  # noqa: PLC0415 (as above)

    table = Table(box=None, padding=(0, 2), show_header=show_header)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def print_overview(view: dict[str, Any], *, as_json: bool) -> None:
    """Prints the view on stdout."""
    if as_json:
        print(json.dumps(view))  # noqa: T201 (the command's output)
        return
    console = output()
    plan = view["plan"]
    console.print(f"plan      {plan_line(plan)}" if plan else f"plan      [red]{view['plan_error']}[/red]")
    for agent in view["agents"]:
        console.print(f"agent     {agent['url']}  {_agent_line(agent)}")
        if "error" in agent:
            continue
        table = columns("version", "role", "state", "predict", "explain", "waiting", "signed", "reason")
        for version in agent["versions"]:
            table.add_row(*_version_row(version))
        console.print(table)
    for gateway in view["gateways"]:
        console.print(f"gateway   {gateway['url']}  {_gateway_line(gateway)}", soft_wrap=True)
    for version, counted in view["counted"].items():
        console.print(f"counted   {version}: {_counted_line(counted)}")
    if view["counted_error"]:
        console.print(f"counted   [yellow]{view['counted_error']}[/yellow]")
    for line in view["drift"]:
        console.print(f"drift     [yellow]{line}[/yellow]")


def list_versions(home: Path, seen: Iterable[dict[str, Any]], model_store: Path) -> list[dict[str, Any]]:
    """Every version in the plan, on an agent of those `seen` or in the model store, with what is known of it."""
    found: dict[str, dict[str, Any]] = {}

    def entry(version: str) -> dict[str, Any]:
        return found.setdefault(version, {"version": version, "role": None, "agents": {}, "archive": None})

    model = "*"
    with contextlib.suppress(ControlError):
        plan = PlanStore(home).read()
        model = plan.model
        for release in plan.releases():
            entry(release.version).update(role=plan_edits.role_of(plan, release.version), archive=release.archive)
    for path in sorted(model_store.glob(f"{model}-*.mar")):
        with contextlib.suppress(ControlError):
            archive = inspect_archive(path)
            accepted = model_contract.dump(archive.contract)["accepted"]
            entry(archive.version).update(archive=path.name, sha256=archive.sha256, accepted=accepted)
    for agent in seen:
        for version in agent.get("versions", []):
            entry(version["version"])["agents"][agent["url"]] = version["state"]
    return [found[version] for version in sorted(found)]


def print_versions(found: list[dict[str, Any]], *, as_json: bool) -> None:
    """Prints the list on stdout."""
    if as_json:
        print(json.dumps(found))  # noqa: T201 (the command's output)
        return
    table = columns("version", "role", "on agents", "archive", "sha256")
    for version in found:
        states = ", ".join(sorted(set(version["agents"].values()))) or "-"
        sha256 = version.get("sha256", "")[:12]
        table.add_row(version["version"], version["role"] or "-", states, version["archive"] or "-", sha256)
    output().print(table)


def plan_line(plan: dict[str, Any]) -> str:
    """The plan in one line."""
    roles = [f"stable {plan['stable']['version']}"]
    if plan["canary"]:
        roles.append(f"canary {plan['canary']['version']} ({plan['canary']['share']:g} %)")
    if plan["shadow"]:
        roles.append(f"shadow {plan['shadow']['version']}")
    roles += [f"retained {release['version']}" for release in plan["retained"]]
    return f"revision {plan['revision']}: {plan['model']}, {', '.join(roles)}"


def _agent_line(agent: dict[str, Any]) -> str:
    if "error" in agent:
        return f"[red]{agent['error']}[/red]"
    server = agent["torchserve"]
    draining = ", draining" if agent["draining"] else ""
    return f"TorchServe {server['state']}, {server['restarts']} restarts{draining}, looked {agent['age_s']:.1f} s ago"


def _gateway_line(gateway: dict[str, Any]) -> str:
    if "error" in gateway:
        return f"[red]{gateway['error']}; --gateways names others[/red]"
    colour = {"ok": "green", "unavailable": "red"}.get(gateway["status"], "yellow")
    reasons = f": {'; '.join(gateway['reasons'])}" if gateway["reasons"] else ""
    return f"[{colour}]{gateway['status']}[/{colour}]{reasons}"


def _version_row(version: dict[str, Any]) -> list[str]:
    predict, explain = version["predict"], version["explain"]
    waiting = sum(entry["pending"] or 0 for entry in (predict, explain))
    colour = {"ready": "green", "failed": "red"}.get(version["state"], "yellow")
    return [
        version["version"],
        version["role"],
        f"[{colour}]{version['state']}[/{colour}]",
        f"{predict['ready']}/{predict['wanted']}",
        f"{explain['ready']}/{explain['wanted']}",
        str(waiting),
        version.get("signed") or "-",
        version["reason"] or "",
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


def serves(agent: dict[str, Any]) -> bool:
    """Whether the agent has a stable version that gateways may send to."""
    return "error" not in agent and any(v["role"] == "stable" and v["routable"] for v in agent["versions"])


def drift(plan: traffic_plan.Plan | None, agent: dict[str, Any]) -> Iterable[str]:
    """Each difference between the plan and what the agent sees, as a sentence."""
    if "error" in agent:
        return
    url = agent["url"]
    if agent["age_s"] > _TOO_OLD_S:
        yield f"{url} last looked {agent['age_s']:.0f} s ago"
    if agent["plan_error"]:
        yield f"{url} goes by an older plan: {agent['plan_error']}"
    for entry in agent["torchserve"].get("removed_entries", ()):
        yield f"{url} removed from TorchServe what it had not registered itself: {entry}"
    if plan is None:
        return
    if agent["plan_revision"] not in {None, plan.revision}:
        yield f"{url} is at plan revision {agent['plan_revision']}, the plan is at {plan.revision}"
    for gateway in agent["gateways"]:
        if gateway["revision"] != plan.revision:
            yield f"gateway {gateway['id']} routes by revision {gateway['revision']}, the plan is at {plan.revision}"
    yield from _version_drift(plan, agent)


def _version_drift(plan: traffic_plan.Plan, agent: dict[str, Any]) -> Iterable[str]:
    url = agent["url"]
    states = {version["version"]: version for version in agent["versions"]}
    for release in plan.releases():
        found = states.pop(release.version, None)
        if found is None or found["state"] != "ready":
            yield f"{url}: {release.version} is {found['state'] if found else 'unknown there'}"
    for version in states:
        yield f"{url}: {version} is loaded and not in the plan"
