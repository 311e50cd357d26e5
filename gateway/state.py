"""The application's state: made once in `gateway.app`, and reached from every route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.auth.callers import Callers
    from gateway.feedback.recorder import Recorder
    from gateway.inference.admission import Admission, BodyBudget
    from gateway.inference.examples import Examples
    from gateway.inference.replicas import Agents
    from gateway.inference.routing import Router
    from gateway.inference.service import InferenceService
    from gateway.inference.shadow import Shadow
    from gateway.settings import Settings
    from gateway.telemetry.metrics import Metrics
    from gateway.telemetry.tracing import Tracer


@dataclass
class AppState:
    """The objects that one gateway process shares between its requests.

    `is_draining` becomes true once, when the process gets SIGTERM. `saturated` counts the calls that were refused
    because no place was free, until they are logged.
    """

    settings: Settings
    agents: Agents
    router: Router
    service: InferenceService
    admission: Admission
    body_budget: BodyBudget
    callers: Callers
    metrics: Metrics
    examples: Examples
    shadow: Shadow
    tracer: Tracer | None = None
    recorder: Recorder | None = None
    is_draining: bool = False
    saturated: int = 0


def state_of(request: Request) -> AppState:
    """Return the state of the application that answers `request`."""
    state: AppState = request.app.state.gateway
    return state
