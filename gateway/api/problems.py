"""Translate any exception into the one error format: `application/problem+json` (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.errors import GatewayError, Internal
from gateway.refusals import MethodNotAllowed, RouteUnknown

if TYPE_CHECKING:
    from collections.abc import Iterable


def from_exception(error: Exception) -> GatewayError:
    """Return the gateway's error for any exception; an unexpected one becomes `Internal`, without its message."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return RouteUnknown()
        if error.status_code == 405:
            return MethodNotAllowed((error.headers or {}).get("Allow", "another method"))
    return Internal()


def problem_response(error: GatewayError, request_id: str, path: str) -> Response:
    """Return the problem document of `error`; for paths below /v2 with the member `error` that V2 clients read."""
    problem = {**error.problem(), "request_id": request_id}
    if path.startswith("/v2"):
        problem["error"] = error.detail
    return Response(
        orjson.dumps(problem, default=str),
        status_code=error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )


def raw_problem(error: GatewayError, request_id: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a whole HTTP/1.1 response in bytes: the problem document of `error`, its headers and `headers`."""
    body = orjson.dumps({**error.problem(), "request_id": request_id})
    own = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\n{own}"
    )
    return b"".join((head.encode("ascii"), *(b"%b: %b\r\n" % header for header in headers), b"\r\n", body))
