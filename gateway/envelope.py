"""The outermost layer of every request: its id, its error answer, its headers, its log line and its metrics.

Pure ASGI, because Starlette's BaseHTTPMiddleware costs a task and two queues for each request. And the calls that are
made most go from here to their endpoints: the framework's layers below would add nothing but a tenth of their time.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.requests import Request

from gateway.early import EarlyRefusals
from gateway.errors import Unavailable
from gateway.exchange import Exchange, request_id_of
from gateway.problems import from_exception, problem_response
from gateway.uploads import ClientGoneError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gateway.parts import Parts

Endpoint: TypeAlias = "Callable[[Request], Awaitable[Response]]"
logger = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx's word in logs and metrics for a caller who left; nobody is answered with it


class Envelope:
    """Wraps `app`, the application that `parts` belong to; a POST to a path in `direct` does without it."""

    def __init__(self, app: ASGIApp, *, parts: Parts, direct: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._parts = parts
        self._direct = direct
        self._early = EarlyRefusals(parts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens inside."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(request_id_of(scope))
        scope["gradserve"] = exchange
        tracer = self._parts.tracer
        span = tracer.begin(scope, exchange) if tracer is not None else None

        async def send_enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                # No image is needed any more, and the caller may take its time to read.
                self._parts.body_budget.give_back(exchange.body_bytes)
                exchange.body_bytes = 0
                headers = message.setdefault("headers", [])
                headers.append((b"x-request-id", exchange.request_id.encode("ascii")))
                headers.append((b"server-timing", exchange.server_timing().encode("ascii")))
                if exchange.quotas:
                    policy, left = exchange.rate_limits()
                    headers.append((b"ratelimit-policy", policy.encode("ascii")))
                    headers.append((b"ratelimit", left.encode("ascii")))
                if self._parts.is_draining:
                    headers.append((b"connection", b"close"))
            await send(message)

        try:
            self._refuse_early(scope, exchange)
            await self._answer(scope, receive, send_enveloped)
        except ClientGoneError:
            exchange.status = CLIENT_GONE
        except Exception as exception:  # noqa: BLE001 — the one place where every failure becomes an answer
            await self._answer_error(exception, scope, receive, send_enveloped)
        finally:
            self._finish(scope, exchange)
            if tracer is not None and span is not None:
                tracer.end(span, scope, exchange)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] == "POST" and path in self._direct:
            scope["gradserve"].route = path
            response = await self._direct[path](Request(scope, receive, send))
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuse_early(self, scope: Scope, exchange: Exchange) -> None:
        """Lets the call pass, unless it would be refused for want of a place after all the work of getting there.

        Raises:
            Unavailable: there is no place, nor one in the line for it.
        """
        if self._early.applies(scope["path"]):
            exchange.route = scope["path"]
            raise Unavailable("saturated")

    def _finish(self, scope: Scope, exchange: Exchange) -> None:
        self._parts.body_budget.give_back(exchange.body_bytes)
        self._parts.metrics.finish(scope["method"], exchange)
        if exchange.code == "saturated" and exchange.status == 503:
            self._parts.saturated += 1  # told together: a line for each would take from those who are answered
        elif logger.isEnabledFor(logging.INFO):
            logger.info("request", extra=log_line(scope, exchange))

    @staticmethod
    async def _answer_error(exception: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["gradserve"]
        error = from_exception(exception)
        exchange.code = error.code
        if error.code == "internal_error":
            logger.error("unhandled exception", exc_info=exception, extra={"request_id": exchange.request_id})
        if exchange.status:  # the answer has begun; nothing can be said any more
            raise exception
        await problem_response(error, exchange.request_id, scope["path"])(scope, receive, send)


def log_line(scope: Scope, exchange: Exchange) -> dict[str, Any]:
    """What a request's log line says."""
    line: dict[str, Any] = {
        "request_id": exchange.request_id,
        "method": scope["method"],
        "route": exchange.route,
        "status": exchange.status,
        "ms": round(exchange.elapsed_s() * 1000, 2),
    }
    line.update((f"{stage}_ms", round(seconds * 1000, 2)) for stage, seconds in exchange.stages.items())
    notes = {
        "version": exchange.version,
        "code": exchange.code,
        "caller": exchange.caller,
        "key": exchange.key,
        "row": exchange.row,
    }
    return {**line, **{name: note for name, note in notes.items() if note}}
