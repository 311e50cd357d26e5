"""What an application is made of, put together once in `gateway.app` and reached from every route."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.admission import BodyBudget
    from gateway.agents import Agents
    from gateway.callers import Callers
    from gateway.dataplane import DataPlane
    from gateway.metrics import Metrics
    from gateway.settings import Settings
    from gateway.shadow import Shadow
    from gateway.tracing import Tracer
    from gateway.versions import Versions


@dataclass
class Parts:
    """The application's parts.

    `is_draining` changes once, when the process is told to stop. `saturated` counts refusals for want of a place until
    they are logged, `refused_early` those of gateway/early.py by their route until they are in the metrics too.
    """

    settings: Settings
    agents: Agents
    versions: Versions
    dataplane: DataPlane
    body_budget: BodyBudget
    callers: Callers
    metrics: Metrics
    shadow: Shadow
    tracer: Tracer | None = None
    is_draining: bool = False
    saturated: int = 0
    refused_early: Counter[str] = field(default_factory=Counter)


def parts_of(request: Request) -> Parts:
    """The parts of the application that answers `request`."""
    parts: Parts = request.app.state.parts
    return parts
