"""The outermost layer of every request: it adds the id, error answer, headers, log line and metrics.

It is pure ASGI, because Starlette's BaseHTTPMiddleware makes a task and two queues for each request.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from gateway.api.compression import MIN_BYTES, compress
from gateway.api.problems import from_exception, problem_response
from gateway.api.uploads import ClientGoneError
from gateway.errors import Unavailable
from gateway.request_context import RequestContext, request_id_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gateway.state import AppState

logger = logging.getLogger(__name__)
# Bytes of a body that are read and dropped after the request is refused. Then the connection is closed.
LATE_BODY_BYTES = 64 * 1024 * 1024
CLIENT_GONE = 499  # nginx's status in logs and metrics for a caller who disconnected; it is never sent


class RequestMiddleware:
    """Middleware around `app`, the application that `state` belongs to."""

    def __init__(self, app: ASGIApp, *, state: AppState) -> None:
        self._app = app
        self._state = state
        predict, explain = state.service.predict_limiter, state.service.explain_limiter
        self._limiters = {"/predict": predict, "/predict/batch": predict, "/explain": explain}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an exception from the application becomes a problem document."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(request_id_of(scope))
        scope["gradserve"] = context
        tracer = self._state.tracer
        span = tracer.begin(scope, context) if tracer is not None else None

        body = Body(receive)
        head: Message | None = None

        async def send_answer(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and self._closes(scope):
                    await body.drop(self._state.settings.body_timeout_s)
                context.status = message["status"]
                self._add_headers(message.setdefault("headers", []), context)
                head = message  # sent together with the body, whose compression changes the headers
                return
            if head is not None:
                if len(message.get("body", b"")) >= MIN_BYTES and not message.get("more_body", False):
                    await compress(scope, head, message)
                start, head = head, None
                await send_message(send, start)
            await send_message(send, message)

        try:
            self._refuse_early(scope, context)
            await self._app(scope, body, send_answer)
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
        limiter = self._limiters.get(scope["path"])
        if limiter is None or not limiter.may_be_full_for_one():
            return  # the usual case, which saves finding the caller
        client = self._state.callers.client_of(Request(scope))
        if limiter.is_full() or (client is not None and limiter.is_full_for(client)):
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

    def _closes(self, scope: Scope) -> bool:
        """Return True if the connection ends after the answer and a body may still come: not if `100` is awaited."""
        headers = dict(scope["headers"])
        if b"expect" in headers:
            return False
        is_last = scope["http_version"] == "1.0" or b"close" in headers.get(b"connection", b"").lower()
        return is_last or self._state.is_draining

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


async def send_message(send: Send, message: Message) -> None:
    """Send a part of the answer.

    Raises:
        ClientGoneError: the caller has just disconnected; uvloop then raises for a write, until uvicorn is told.
    """
    try:
        await send(message)
    except RuntimeError as error:
        raise ClientGoneError if "closed" in str(error) else error from error


class Body:
    """The messages of a request's body, which the application receives."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_complete = False

    async def __call__(self) -> Message:
        """Return the next message."""
        message = await self._receive()
        self._is_complete = not message.get("more_body", False)
        return message

    async def drop(self, timeout_s: float) -> None:
        """Read and drop the rest, up to `LATE_BODY_BYTES`.

        Many callers read an answer only after they have sent the whole body. If the connection were closed before, it
        would be reset, and they would lose the answer.
        """
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_complete and dropped <= LATE_BODY_BYTES:
                    dropped += len((await self()).get("body", b""))


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
