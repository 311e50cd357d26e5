"""The dependencies of the routes: application state, request context, authorization and deadline."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import Request

from gateway.api.params import TimeoutMs
from gateway.inference.torchserve import Deadline
from gateway.request_context import RequestContext, context_of
from gateway.state import AppState, state_of

# These two only document the headers in OpenAPI; gateway/auth/callers.py reads them.
BEARER = HTTPBearer(scheme_name="bearer", auto_error=False)
KEY_HEADER = APIKeyHeader(name="x-api-key", scheme_name="header", auto_error=False)


# Dependencies are coroutines because FastAPI runs each plain function in a thread.
async def _state(request: Request) -> AppState:
    return state_of(request)


async def _context(request: Request) -> RequestContext:
    return context_of(request.scope)


State = Annotated[AppState, Depends(_state)]
Context = Annotated[RequestContext, Depends(_context)]


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


async def _deadline(state: State, timeout_ms: TimeoutMs = None) -> Deadline:
    longest_s = state.settings.timeout_s
    return Deadline(longest_s if timeout_ms is None else min(timeout_ms / 1000, longest_s))


CallDeadline = Annotated[Deadline, Depends(_deadline)]
