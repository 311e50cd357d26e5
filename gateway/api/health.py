"""`/livez`, `/readyz`, `/health`, `/models` and `/metrics`: from the agents' last statuses, without a request."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from contracts import model as model_contract
from contracts.status import Pool, VersionStatus
from gateway.api.dependencies import State, require
from gateway.api.openapi import examples
from gateway.api.openapi.responses import GUARD, JSON, PROBE, answers, problems
from gateway.api.schemas import Health, Models
from gateway.api.schemas import State as Probe
from gateway.errors import Unavailable
from gateway.state import AppState
from gateway.telemetry.metrics import CONTENT_TYPE
from gateway.telemetry.state_metrics import state_metrics

router = APIRouter(tags=["state"])
UNAVAILABLE = {"description": "The stable version is not ready", "content": {JSON: {"example": examples.HEALTH}}}


@router.get("/livez", summary="The process is alive", response_model=Probe)
async def livez() -> dict[str, str]:
    """Answer 200 while the process runs, whatever TorchServe's state."""
    return {"status": "alive"}


@router.get("/readyz", summary="Calls can be sent here", response_model=Probe, responses=problems(*PROBE))
async def readyz(state: State) -> dict[str, str]:
    """Answer 200 while calls should be sent to this gateway."""
    refuse_unready(state)
    return {"status": "ready"}


@router.get(
    "/health",
    summary="The health report",
    response_model=Health,
    responses={**answers(examples.HEALTH), 503: {"model": Health, **UNAVAILABLE}},
)
async def health(state: State, response: Response) -> dict[str, Any]:
    """Report the versions' health: 200 while the stable version is ready, 503 otherwise."""
    report = health_report(state)
    if report["status"] == "unavailable":
        response.status_code = 503
        response.headers["retry-after"] = "1"
    return report


@router.get(
    "/models",
    summary="The versions",
    dependencies=[require("read")],
    response_model=Models,
    responses=answers(examples.MODELS, *GUARD),
)
async def models(request: Request, state: State) -> dict[str, Any]:
    """List the versions that are loaded, with their roles, workers and contracts; of the models that the key names."""
    plan, allowed = state.router.plan, request.state.caller.models
    versions = [version for version in merge_versions(state) if not allowed or version["model"] in allowed]
    return {"name": plan.model if plan else None, "versions": versions}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    dependencies=[require("read")],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(*GUARD)},
)
async def metrics(state: State) -> Response:
    """Return the metrics of all gateway processes in Prometheus's text format."""
    # In a thread: reading the files of all processes blocks for milliseconds.
    text = await asyncio.to_thread(state.metrics.render, state_metrics(state))
    return Response(text, media_type=CONTENT_TYPE)


def refuse_unready(state: AppState) -> None:
    """Refuse a probe while calls should go to another gateway.

    Raises:
        Unavailable: the gateway is shutting down, or the stable version is not ready.
    """
    if state.is_draining:
        raise Unavailable("draining")
    if not state.router.is_ready():
        raise Unavailable("not_ready")


def health_report(state: AppState) -> dict[str, Any]:
    """Return the health report; `reasons` says what is wrong.

    `status` is `ok` if every worker that the plan wants is ready, `degraded` if the stable version is ready but
    something is wrong, else `unavailable`.
    """
    versions = merge_versions(state)
    plan = state.router.plan
    reasons = _reasons(state, versions)
    status = "degraded" if reasons else "ok"
    if state.is_draining or not state.router.is_ready():
        status = "unavailable"
    return {
        "status": status,
        "model": plan.model if plan else None,
        "plan_revision": plan.revision if plan else None,
        "replicas": {"known": len(state.agents.replicas), "seen": len(state.agents.current())},
        "versions": [{key: value for key, value in version.items() if key != "contract"} for version in versions],
        "reasons": reasons,
    }


def merge_versions(state: AppState) -> list[dict[str, Any]]:
    """Return each version once: its workers summed over the replicas, its state the worst that a replica reports."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for _, _, seen in state.router.seen():
        entry = merged.setdefault((seen.model, seen.version), _blank(seen, _share(state, seen)))
        entry["routable"] = entry["routable"] or seen.routable
        entry["state"] = max(entry["state"], _known_state(seen), key=STATES.index)
        for kind, pool in (("predict", seen.predict), ("explain", seen.explain)):
            _add_pool(entry["workers"][kind], pool)
    return list(merged.values())


# From best to worst.
STATES = ("ready", "degraded", "verifying", "loading", "failed")


def _known_state(seen: VersionStatus) -> str:
    return seen.state if seen.state in STATES else "failed"


def _share(state: AppState, seen: VersionStatus) -> float:
    plan = state.router.plans.plan(seen.model) if state.router.plans is not None else None
    return plan.share_of(seen.version) if plan is not None else 0.0


def _blank(seen: VersionStatus, share: float) -> dict[str, Any]:
    return {
        "model": seen.model,
        "version": seen.version,
        "role": seen.role,
        "share": share,
        "state": _known_state(seen),
        "routable": False,
        "workers": {kind: {"ready": 0, "wanted": 0, "fallback": 0, "pending": None} for kind in ("predict", "explain")},
        "contract": model_contract.dump(seen.contract) if seen.contract is not None else {},
    }


def _add_pool(total: dict[str, Any], pool: Pool) -> None:
    total["ready"] += pool.ready
    total["wanted"] += pool.wanted
    total["fallback"] += pool.fallback
    if pool.pending is not None:
        total["pending"] = (total["pending"] or 0) + pool.pending


def _reasons(state: AppState, versions: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for everything that is wrong."""
    reasons = []
    if state.is_draining:
        reasons.append("this gateway is shutting down")
    if state.router.plan_error is not None:
        reasons.append(state.router.plan_error)
    unseen = len(state.agents.replicas) - len(state.agents.current())
    if unseen:
        reasons.append(f"{unseen} of {len(state.agents.replicas)} agents give no fresh status")
    for version in versions:
        if version["role"] == "retiring":
            continue
        name = _name(state, version["model"], version["version"])
        missing = [
            f"{name}: {pool['ready']} of {pool['wanted']} {kind} workers are ready"
            for kind, pool in version["workers"].items()
            if pool["ready"] < pool["wanted"]
        ]
        # Only if degraded: on a machine where the engine never ran, the fallback engine is what the agent verified.
        if version["state"] == "degraded":
            missing += [
                f"{name}: {pool['fallback']} of {pool['ready']} {kind} workers run the fallback engine"
                for kind, pool in version["workers"].items()
                if pool["fallback"]
            ]
        if version["state"] != "ready" and not missing:
            missing = [f"{name} is {version['state']}"]
        reasons += missing
    if state.router.plans is not None and state.agents.current():
        known = {(version["model"], version["version"]) for version in versions}
        wanted = [
            (plan.model, release.version)
            for plan in state.router.plans.models
            for release in plan.releases()
            if release.workers != 0
        ]
        reasons += [
            f"{_name(state, *version)} is in the plan, and no agent has it yet"
            for version in wanted
            if version not in known
        ]
    return reasons


def _name(state: AppState, model: str, version: str) -> str:
    """Return the version's name for a sentence: with its model if the plan has several."""
    is_alone = state.router.plans is None or len(state.router.plans.models) == 1
    return version if is_alone else f"{model} {version}"
