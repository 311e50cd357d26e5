"""The checks of `gradserve doctor`. Each returns findings: the severity, what was found, and the remedy."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx

from control.agent.torchserve.process import find_java, torchserve_home
from control.agent.torchserve.run_folder import run_base
from control.agents import AgentAnswer, ask_agents
from control.archive import inspect_archive, load_trusted_keys
from control.archive_download import shown
from control.cli.keys import read_keys
from control.cli.status import ask_gateway, columns, drift, output
from control.errors import ControlError
from control.release.plan_store import open_store
from control.settings import PORTS, read_agent_settings, trusted_key_files
from control.stack.ports import refuse_taken_ports
from gateway.settings import trusts_everyone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from contracts import plan as traffic_plan

_LITTLE_DISK_BYTES = 2_000_000_000
_CLOCK_OFF_S = 3.0
_EXPIRES_SOON = timedelta(days=14)


@dataclass(frozen=True)
class Finding:
    """The result of one check: its severity, what was found, and the remedy if there is something to do."""

    severity: Literal["good", "note", "bad"]
    about: str
    text: str
    remedy: str = ""


def examine(home: Path, agents: Sequence[str], gateways: Sequence[str], model_store: Path) -> list[Finding]:
    """Return every finding, in the order in which a request would meet the problem."""
    seen = ask_agents(agents)
    plan, plan_finding = _plan(home)
    return [
        *_installed(),
        *_settings(seen),
        plan_finding,
        *(_archives(plan, model_store) if plan else []),
        *(finding for agent in seen for finding in _agent(plan, agent)),
        *(_gateway(ask_gateway(url)) for url in gateways),
        _disk(home),
        _mlflow(),
        *_keys(),
        *_proxies(),
    ]


def print_findings(findings: Iterable[Finding], *, as_json: bool) -> None:
    """Print the findings on stdout."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))  # noqa: T201 (the command's output)
        return
    table = columns("", "about", "finding", show_header=False)
    marks = {"good": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}
    for finding in findings:
        remedy = f"\n[bold]{finding.remedy}[/bold]" if finding.remedy else ""
        table.add_row(marks[finding.severity], finding.about, finding.text + remedy)
    output().print(table)


def _installed() -> Iterable[Finding]:
    """Yield findings on Java, TorchServe and kill, which the agent needs and the gateway does not."""
    checks: list[tuple[str, Callable[[], object]]] = [("Java", find_java), ("TorchServe", torchserve_home)]
    for about, find in checks:
        try:
            yield Finding("good", about, str(find()))
        except ControlError as error:
            yield Finding("bad", about, "not found", str(error))
    if shutil.which("kill") is None:
        yield Finding("bad", "kill", "not on PATH: TorchServe cannot stop workers", "install procps")


def _settings(seen: Sequence[AgentAnswer]) -> Iterable[Finding]:
    try:
        settings = read_agent_settings()
    except ControlError as error:
        yield Finding("bad", "settings", str(error), "correct the variable (.env.example lists all)")
        return
    yield Finding("good", "settings", "every AGENT_* variable is known")
    try:
        yield Finding("good", "temporary files", str(run_base(settings.temp)))
    except ControlError as error:
        yield Finding("bad", "temporary files", str(error), "set AGENT_TEMP to a short path on a local disk")
    if any(agent.status is not None for agent in seen):
        return  # the running agent itself listens on the ports
    try:
        # `up` finds free ports for those that are not set.
        named = {getattr(settings, field) for field in PORTS if field in settings.model_fields_set}
        refuse_taken_ports({port: use for port, use in settings.ports().items() if port in named})
        text = f"free: {', '.join(map(str, sorted(named)))}" if named else "none is set: up finds free ones"
        yield Finding("good", "ports", text)
    except ControlError as error:
        yield Finding("bad", "ports", str(error), "stop the program that uses it, or set the variable to another port")


def _plan(home: Path) -> tuple[traffic_plan.Plans | None, Finding]:
    try:
        plans = open_store(home).read_all()
    except ControlError as error:
        return None, Finding(
            "bad", "plan", str(error), "gradserve up writes the first plan; earlier ones are in the history folder"
        )
    stable = ", ".join(f"{plan.model} {plan.stable.version}" for plan in plans.models)
    return plans, Finding("good", "plan", f"revision {plans.revision}, stable {stable}")


def _archives(plans: traffic_plan.Plans, model_store: Path) -> Iterable[Finding]:
    try:
        trusted = load_trusted_keys(trusted_key_files())
    except ControlError as error:
        yield Finding("bad", "signatures", str(error), "correct AGENT_TRUSTED_KEYS: no agent starts with this value")
        return
    stable = [plan.stable for plan in plans.models]
    for release in (release for plan in plans.models for release in plan.releases()):
        if release.source is not None and not (model_store / release.archive).exists():
            yield Finding("good", "archive", f"{release.archive}: agents fetch it from {shown(release.source)}")
            continue
        try:
            archive = inspect_archive(model_store / release.archive, release.sha256, trusted=trusted)
        except ControlError as error:
            severity: Literal["note", "bad"] = "bad" if release in stable else "note"
            yield Finding(severity, "archive", str(error), "restore the file, or pack it again and deploy it")
            continue
        classes = len(archive.classes)
        text = f"{release.archive}: hash and contract hold, {classes} classes, signed: {archive.signed}"
        yield Finding("good", "archive", text)
    if trusted is None:
        text = "not required: anyone who can change the plan and an archive, or MLflow's registry, can run code here"
        yield Finding(
            "note", "signatures", text, "gradserve archive sign, and AGENT_TRUSTED_KEYS (docs/how-to/sign-archives.md)"
        )


def _agent(plan: traffic_plan.Plans | None, agent: AgentAnswer) -> Iterable[Finding]:
    about = f"agent {agent.url}"
    if agent.status is None:
        yield Finding(
            "bad", about, agent.error, "start it: gradserve up or gradserve agent; or pass its address by --agents"
        )
        return
    differences = list(drift(plan, agent))
    for line in differences:
        yield Finding("note" if agent.serves else "bad", about, line, "the agent repairs this; its log has the details")
    ahead = agent.status.observed_at - time.time()
    if ahead > _CLOCK_OFF_S:
        text = f"its clock is {ahead:.0f} s ahead of this machine's"
        yield Finding("bad", about, text, "synchronise the clocks: the times in their logs cannot be compared")
    if not differences:
        yield Finding("good", about, "follows the plan")


def _gateway(gateway: dict[str, Any]) -> Finding:
    about = f"gateway {gateway['url']}"
    if "error" in gateway:
        return Finding("bad", about, gateway["error"], "start it with gradserve up, or pass its address by --gateways")
    if gateway["status"] == "ok":
        return Finding("good", about, "ok")
    severity: Literal["note", "bad"] = "bad" if gateway["status"] == "unavailable" else "note"
    return Finding(
        severity, about, "; ".join([gateway["status"], *gateway["reasons"]]), "see the findings about the agents"
    )


def _disk(home: Path) -> Finding:
    folder = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    if free < _LITTLE_DISK_BYTES:
        return Finding("bad", "disk", text, "free some space: gradserve prune lists unused files")
    return Finding("good", "disk", text)


def _mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")):
        return Finding("good", "MLflow", f"no server: {uri or 'a SQLite file in the working directory'}")
    try:
        httpx.get(f"{uri.rstrip('/')}/health", timeout=3.0).raise_for_status()
    except httpx.HTTPError as error:
        text = f"{urlsplit(uri).hostname} does not answer ({type(error).__name__})"
        return Finding(
            "note", "MLflow", text, "serving and training work without it; `train --resume` sends the missing records"
        )
    return Finding("good", "MLflow", f"{urlsplit(uri).hostname} answers")


def _keys() -> Iterable[Finding]:
    named, entries = os.environ.get("GATEWAY_KEYS_FILE"), os.environ.get("GATEWAY_KEYS")
    if not named and not entries:
        yield Finding("note", "keys", "none: the gateway serves loopback only, unless its settings allow everyone")
        return
    if not named:
        yield Finding("good", "keys", "configured")
        return
    file = Path(named)
    try:
        keys = read_keys(file)
    except ControlError as error:
        yield Finding("bad", "keys", str(error), "restore a copy, or make new keys: gradserve keys make")
        return
    if not file.is_file():
        yield Finding("bad", "keys", f"{file} does not exist", "run gradserve keys make, or correct GATEWAY_KEYS_FILE")
        return
    if file.stat().st_mode & 0o007:
        yield Finding("note", "keys", f"every user of this machine can read or write {file}", f"chmod 640 {file}")
    still_valid = {key.name for key in keys if not key.is_expired(datetime.now(UTC) + _EXPIRES_SOON)}
    for key in keys:
        if key.expires and key.name not in still_valid:
            verb, remedy = ("expired", "make") if key.is_expired() else ("expires", "rotate")
            text = f"{key.name} {verb} at {key.expires}"
            yield Finding("note", "keys", text, f"gradserve keys {remedy} {key.name} --expires 90d")
    yield Finding("good", "keys", f"configured: {len(keys)} in {file}")


def _proxies() -> Iterable[Finding]:
    if trusts_everyone(os.environ.get("GATEWAY_TRUSTED_PROXIES", "").split(",")):
        text = "GATEWAY_TRUSTED_PROXIES trusts everyone: every caller can claim any address"
        yield Finding(
            "bad",
            "proxies",
            text,
            "set the addresses of your proxies: quotas and logs use the address that a proxy reports",
        )
