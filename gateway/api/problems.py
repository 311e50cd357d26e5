"""How any exception becomes the one error answer: `application/problem+json` (RFC 9457)."""

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
    """The gateway's own error for any exception; an unknown one becomes `Internal` and tells nothing."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return RouteUnknown()
        if error.status_code == 405:
            return MethodNotAllowed((error.headers or {}).get("Allow", "another method"))
    return Internal()


def problem_response(error: GatewayError, request_id: str, path: str) -> Response:
    """The problem document of `error` as a response; below /v2 with the member that the V2 protocol's clients read."""
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
    """The problem document of `error` as the bytes of an HTTP/1.1 response with its headers and these."""
    body = orjson.dumps({**error.problem(), "request_id": request_id})
    own = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\n{own}"
    )
    return b"".join((head.encode("ascii"), *(b"%b: %b\r\n" % header for header in headers), b"\r\n", body))
