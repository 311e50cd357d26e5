"""The outermost layer of every request: it adds the id, error answer, headers, log line and metrics.

It is pure ASGI, because Starlette's BaseHTTPMiddleware makes a task and two queues for each request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gateway.api.compression import MIN_BYTES, compress
from gateway.api.problems import from_exception, problem_response
from gateway.api.uploads import ClientGoneError
from gateway.errors import Unavailable
from gateway.request_context import RequestContext, request_id_of
from gateway.server.load_shedding import LoadShedder

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gateway.state import AppState

logger = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx's status in logs and metrics for a caller who disconnected; it is never sent


class RequestMiddleware:
    """Middleware around `app`, the application that `state` belongs to."""

    def __init__(self, app: ASGIApp, *, state: AppState) -> None:
        self._app = app
        self._state = state
        self._load_shedder = LoadShedder(state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an exception from the application becomes a problem document."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(request_id_of(scope))
        scope["gradserve"] = context
        tracer = self._state.tracer
        span = tracer.begin(scope, context) if tracer is not None else None

        head: Message | None = None

        async def send_answer(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                context.status = message["status"]
                self._add_headers(message.setdefault("headers", []), context)
                head = message  # sent together with the body, whose compression changes the headers
                return
            if head is not None:
                if len(message.get("body", b"")) >= MIN_BYTES and not message.get("more_body", False):
                    await compress(scope, head, message)
                start, head = head, None
                await send(start)
            await send(message)

        try:
            self._refuse_early(scope, context)
            await self._app(scope, receive, send_answer)
        except ClientGoneError:
            context.status = CLIENT_GONE
        except Exception as exception:  # noqa: BLE001 — the one place where every failure becomes an answer
            await self._answer_error(exception, scope, receive, send_answer)
        finally:
            self._finish(scope, context)
            if tracer is not None and span is not None:
                tracer.end(span, scope, context)

    def _add_headers(self, headers: list[tuple[bytes, bytes]], context: RequestContext) -> None:
        # The images are not needed any more; the caller may take long to read the answer.
        self._state.body_budget.give_back(context.body_bytes)
        context.body_bytes = 0
        headers.append((b"x-request-id", context.request_id.encode("ascii")))
        headers.append((b"server-timing", context.server_timing().encode("ascii")))
        if context.quotas:
            policy, left = context.rate_limits()
            headers.append((b"ratelimit-policy", policy.encode("ascii")))
            headers.append((b"ratelimit", left.encode("ascii")))
        if self._state.is_draining:
            headers.append((b"connection", b"close"))

    def _refuse_early(self, scope: Scope, context: RequestContext) -> None:
        """Refuse a call that gets no place, before its body is read.

        Raises:
            Unavailable: no place is free, and the queue for one is full.
        """
        if self._load_shedder.applies(scope):
            context.route = scope["path"]
            raise Unavailable("saturated")

    def _finish(self, scope: Scope, context: RequestContext) -> None:
        if (route := scope.get("route")) is not None:
            context.route = route.path
        self._state.body_budget.give_back(context.body_bytes)
        self._state.metrics.finish(scope["method"], context)
        if context.code == "saturated" and context.status == 503:
            self._state.saturated += 1  # logged together: a line for each would take time from served calls
        elif logger.isEnabledFor(logging.INFO):
            logger.info("request", extra=log_line(scope, context))

    @staticmethod
    async def _answer_error(exception: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope["gradserve"]
        error = from_exception(exception)
        context.code = error.code
        if error.code == "internal_error":
            logger.error("unhandled exception", exc_info=exception, extra={"request_id": context.request_id})
        if context.status:  # the answer has begun, so its status cannot be changed
            raise exception
        await problem_response(error, context.request_id, scope["path"])(scope, receive, send)


def log_line(scope: Scope, context: RequestContext) -> dict[str, Any]:
    """Return the members of a request's log line."""
    line: dict[str, Any] = {
        "request_id": context.request_id,
        "method": scope["method"],
        "route": context.route,
        "status": context.status,
        "ms": round(context.elapsed_s() * 1000, 2),
    }
    line.update((f"{stage}_ms", round(seconds * 1000, 2)) for stage, seconds in context.stages.items())
    notes = {
        "version": context.version,
        "code": context.code,
        "caller": context.caller,
        "key": context.key,
        "row": context.batch_id,
    }
    return {**line, **{name: note for name, note in notes.items() if note}}
