"""How any exception becomes the one error answer: `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.errors import GatewayError, Internal, MethodNotAllowed, RouteUnknown


def from_exception(error: Exception) -> GatewayError:
    """The gateway's own error for any exception; an unknown one becomes `Internal` and tells nothing."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return RouteUnknown()
        if error.status_code == 405:
            return MethodNotAllowed((error.headers or {}).get("Allow", "another method"))
    return Internal()


def problem_response(error: GatewayError, request_id: str) -> Response:
    """The problem document of `error` as a response."""
    return Response(
        orjson.dumps({**error.problem(), "request_id": request_id}, default=str),
        status_code=error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )
