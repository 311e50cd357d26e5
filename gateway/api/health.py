"""`/livez`, `/readyz`, `/health` and `/models`: what the agents saw last, so a probe costs nothing and asks nobody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from contracts import model as model_contract
from gateway.api.predictions import json_response
from gateway.errors import Unavailable
from gateway.state import AppState, state_of
from gateway.telemetry.metrics import CONTENT_TYPE
from gateway.telemetry.state_metrics import state_metrics

if TYPE_CHECKING:
    from starlette.requests import Request

    from contracts.status import Pool, VersionStatus


async def livez(request: Request) -> Response:  # noqa: ARG001 — a route's signature
    """The process answers; whether TorchServe does is none of its business."""
    return json_response({"status": "alive"})


async def readyz(request: Request) -> Response:
    """Whether calls should be sent here."""
    parts = state_of(request)
    if parts.is_draining:
        raise Unavailable("draining")
    if not parts.versions.is_ready():
        raise Unavailable("not_ready")
    return json_response({"status": "ready"})


async def health(request: Request) -> Response:
    """What serves, 200 while the stable version answers and 503 while it does not."""
    report = health_report(state_of(request))
    unavailable = report["status"] == "unavailable"
    return json_response(
        report, status=503 if unavailable else 200, headers={"retry-after": "1"} if unavailable else None
    )


async def models(request: Request) -> Response:
    """The versions that are loaded, with their roles, workers and contracts."""
    parts = state_of(request)
    await parts.callers.admit(request, "read")
    plan = parts.versions.plan
    merged = merge_versions(parts)
    return json_response({"name": plan.model if plan else None, "versions": merged})


async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    parts = state_of(request)
    await parts.callers.admit(request, "read")
    # Several processes' files are read, which blocks for milliseconds.
    text = await asyncio.to_thread(parts.metrics.render, state_metrics(parts))
    return Response(text, media_type=CONTENT_TYPE)


def health_report(parts: AppState) -> dict[str, Any]:
    """`ok`: every worker that the plan wants is ready; `degraded`: the stable version answers, but not all is well."""
    versions = merge_versions(parts)
    plan = parts.versions.plan
    complaints = _complaints(parts, versions)
    status = "degraded" if complaints else "ok"
    if parts.is_draining or not parts.versions.is_ready():
        status = "unavailable"
    return {
        "status": status,
        "model": plan.model if plan else None,
        "plan_revision": plan.revision if plan else None,
        "replicas": {"known": len(parts.agents.replicas), "seen": len(parts.agents.current())},
        "versions": [{key: value for key, value in version.items() if key != "contract"} for version in versions],
        "reasons": complaints,
    }


def merge_versions(parts: AppState) -> list[dict[str, Any]]:
    """Each version once, its workers summed over the replicas; the state is the worst that a replica reports."""
    merged: dict[str, dict[str, Any]] = {}
    for _, _, seen in parts.versions.seen():
        entry = merged.setdefault(seen.version, _blank(seen))
        entry["routable"] = entry["routable"] or seen.routable
        entry["state"] = max(entry["state"], _state(seen), key=STATES.index)
        for kind, pool in (("predict", seen.predict), ("explain", seen.explain)):
            _add_pool(entry["workers"][kind], pool)
    return list(merged.values())


# From best to worst.
STATES = ("ready", "degraded", "verifying", "loading", "failed")


def _state(seen: VersionStatus) -> str:
    return seen.state if seen.state in STATES else "failed"


def _blank(seen: VersionStatus) -> dict[str, Any]:
    return {
        "version": seen.version,
        "role": seen.role,
        "state": _state(seen),
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


def _complaints(parts: AppState, versions: list[dict[str, Any]]) -> list[str]:
    reasons = []
    if parts.is_draining:
        reasons.append("this gateway is shutting down")
    if parts.versions.plan_error is not None:
        reasons.append(parts.versions.plan_error)
    unseen = len(parts.agents.replicas) - len(parts.agents.current())
    if unseen:
        reasons.append(f"{unseen} of {len(parts.agents.replicas)} agents give no fresh status")
    for version in versions:
        if version["role"] == "retiring":
            continue
        missing = [
            f"{version['version']}: {pool['ready']} of {pool['wanted']} {kind} workers are ready"
            for kind, pool in version["workers"].items()
            if pool["ready"] < pool["wanted"]
        ]
        if version["state"] == "degraded":  # a machine on which the engine never ran is as it was verified
            missing += [
                f"{version['version']}: {pool['fallback']} of {pool['ready']} {kind} workers run the fallback engine"
                for kind, pool in version["workers"].items()
                if pool["fallback"]
            ]
        if version["state"] != "ready" and not missing:
            missing = [f"{version['version']} is {version['state']}"]
        reasons += missing
    if parts.versions.plan is not None and parts.agents.current():
        known = {version["version"] for version in versions}
        wanted = [release.version for release in parts.versions.plan.releases()]
        reasons += [f"{version} is in the plan, and no agent has it yet" for version in wanted if version not in known]
    return reasons
