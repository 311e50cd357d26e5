"""The dependencies of the routes: application state, request context, authorization and deadline."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import Request

from contracts.wire import Options
from gateway.api.params import TimeoutMs, refuse_repeated
from gateway.inference.answer import Answer, Call
from gateway.inference.torchserve import Deadline
from gateway.request_context import context_of
from gateway.state import AppState, state_of

# These two only document the headers in OpenAPI; gateway/auth/callers.py reads them.
BEARER = HTTPBearer(scheme_name="bearer", auto_error=False)
KEY_HEADER = APIKeyHeader(name="x-api-key", scheme_name="header", auto_error=False)


# Dependencies are coroutines because FastAPI runs each plain function in a thread.
async def _state(request: Request) -> AppState:
    return state_of(request)


State = Annotated[AppState, Depends(_state)]


def require(scope: str) -> Any:  # noqa: ANN401 — FastAPI's own type of a dependency
    """Return the dependency that admits a call if its key has `scope` and its quota is not used up."""

    async def admit(
        request: Request,
        state: State,
        _bearer: Annotated[object, Security(BEARER)],
        _header: Annotated[object, Security(KEY_HEADER)],
    ) -> None:
        await state.callers.admit(request, scope)

    return Depends(admit)


class Admitted(NamedTuple):
    """A call that was admitted: the application's state, the request's id, and what the inference service needs."""

    state: AppState
    request_id: str
    call: Call


def admit(scope: str) -> Any:  # noqa: ANN401 — FastAPI's own type of a dependency
    """Return the one dependency of a route that takes images: as `require`, with all that such a route needs.

    One, because each dependency costs a call 10 to 15 µs.
    """

    async def admitted(request: Request, timeout_ms: TimeoutMs = None) -> Admitted:
        state = state_of(request)
        plans = state.router.plans
        await state.callers.admit(request, scope, None if plans is None else plans.default)
        refuse_repeated(request)
        longest_s = state.settings.timeout_s
        timeout_s = longest_s if timeout_ms is None else min(timeout_ms / 1000, longest_s)
        context, caller = context_of(request.scope), request.state.caller
        carried = Options(context.request_id, traceparent=context.traceparent or None)
        call = Call(Deadline(timeout_s), carried, caller.client, caller.name)
        return Admitted(state, context.request_id, call)

    return Depends(admitted)


def accept(request: Request, answer: Answer) -> Answer:
    """Note the inference service's answer for the log and the metrics, and return it.

    Raises:
        GatewayError: the answer is an error.
    """
    request.state.answer = answer
    if answer.error is not None:
        raise answer.error
    return answer
