"""The outermost layer of every request: it adds the id, error answer, headers, log line and metrics.

It is pure ASGI, because Starlette's BaseHTTPMiddleware makes a task and two queues for each request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.datastructures import QueryParams
from starlette.requests import Request

from gateway.api.compression import MIN_BYTES, compress
from gateway.api.problems import from_exception, problem_response
from gateway.api.uploads import ClientGoneError
from gateway.errors import Unavailable
from gateway.request_context import RequestContext, context_of, request_id_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gateway.inference.admission import BodyBudget
    from gateway.state import AppState

logger = logging.getLogger(__name__)
# Bytes of a body that are read and dropped after the request is refused. Then the connection is closed.
LATE_BODY_BYTES = 64 * 1024 * 1024
# The kinds of calls whose places are looked at before the body is read.
KINDS = {"/predict": "predict", "/predict/batch": "predict", "/explain": "explain", "/explain/batch": "explain"}
CLIENT_GONE = 499  # nginx's status in logs and metrics for a caller who disconnected; it is never sent


class RequestMiddleware:
    """Middleware around `app`, the application that `state` belongs to."""

    def __init__(self, app: ASGIApp, *, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an exception from the application becomes a problem document."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = scope["gradserve"] = RequestContext(request_id_of(scope))
        scope.setdefault("state", {})
        tracer, span = self._state.tracer, None
        if tracer is not None:
            span, context.traceparent = tracer.begin(scope)

        body = Body(receive, self._state.body_budget)
        head: Message | None = None

        async def send_answer(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and self._closes(scope):
                    await body.drop(self._state.settings.body_timeout_s)
                context.status = message["status"]
                note(scope, context, body)
                body.release()  # the images are not needed any more; the caller may take long to read the answer
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
            await self._run(scope, body, send_answer)
        except ClientGoneError:
            context.status = CLIENT_GONE
            note(scope, context, body)
        finally:
            body.release()
            self._finish(scope, context)
            if tracer is not None and span is not None:
                tracer.end(span, scope, context)

    async def _run(self, scope: Scope, body: Body, send: Send) -> None:
        try:
            self._refuse_early(scope)
            await self._app(scope, body, send)
        except ClientGoneError:
            raise
        except Exception as exception:  # noqa: BLE001 — the one place where every failure becomes an answer
            await self._answer_error(exception, scope, body, send)

    def _add_headers(self, headers: list[tuple[bytes, bytes]], context: RequestContext) -> None:
        headers.append((b"x-request-id", context.request_id.encode("ascii")))
        headers.append((b"server-timing", context.server_timing().encode("ascii")))
        if context.caller.quotas:
            policy, left = context.rate_limits()
            headers.append((b"ratelimit-policy", policy.encode("ascii")))
            headers.append((b"ratelimit", left.encode("ascii")))
        if self._state.is_draining:
            headers.append((b"connection", b"close"))

    def _refuse_early(self, scope: Scope) -> None:
        """Refuse a call that gets no place, before its body is read.

        Raises:
            Unavailable: no place is free, and the queue for one is full.
        """
        kind, plans = KINDS.get(scope["path"]), self._state.router.plans
        plan = None if kind is None or plans is None else plans.plan(model_asked(scope["query_string"]))
        if kind is None or plan is None:
            return  # the route takes no places, or answers that there is no such model
        limiter = self._state.admission.of(plan.model).limiters[kind]
        if not limiter.may_be_full_for_one():
            return  # the usual case, which saves finding the caller
        client = self._state.callers.client_of(Request(scope))
        if limiter.is_full() or (client is not None and limiter.is_full_for(client)):
            context = context_of(scope)
            context.route, context.model = scope["path"], plan.model
            raise Unavailable("saturated")

    def _finish(self, scope: Scope, context: RequestContext) -> None:
        if (route := scope.get("route")) is not None:
            context.route = route.path
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
        context = context_of(scope)
        error = scope["state"]["error"] = from_exception(exception)
        if error.code == "internal_error":
            logger.error("unhandled exception", exc_info=exception, extra={"request_id": context.request_id})
        if context.status:  # the answer has begun, so its status cannot be changed
            raise exception
        await problem_response(error, context.request_id, scope["path"])(scope, receive, send)


def model_asked(query: bytes) -> str | None:
    """Return the model that a call's query names; None if it names none."""
    if b"model=" not in query:
        return None  # the usual case
    return QueryParams(query).get("model")


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
    """The messages of a request's body: the application receives them; they are timed, and count in `budget`."""

    def __init__(self, receive: Receive, budget: BodyBudget) -> None:
        self._receive = receive
        self._budget = budget
        self._held = 0
        self._is_complete = False
        self.seconds: float | None = None
        """The seconds spent on waiting for it; None if the application did not ask for it."""

    async def __call__(self) -> Message:
        """Return the next message.

        Raises:
            Unavailable: the bodies of all requests together would be too large.
        """
        began = time.perf_counter()
        try:
            message = await self._receive()
        finally:
            self.seconds = (self.seconds or 0.0) + time.perf_counter() - began
        self._is_complete = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self._budget.take(size)
        self._held += size
        return message

    def release(self) -> None:
        """Give the bytes back to the budget."""
        self._budget.give_back(self._held)
        self._held = 0

    async def drop(self, timeout_s: float) -> None:
        """Read and drop the rest, up to `LATE_BODY_BYTES`.

        Many callers read an answer only after they have sent the whole body. If the connection were closed before, it
        would be reset, and they would lose the answer.
        """
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_complete and dropped <= LATE_BODY_BYTES:
                    message = await self._receive()
                    self._is_complete = not message.get("more_body", False)
                    dropped += len(message.get("body", b""))


def note(scope: Scope, context: RequestContext, body: Body) -> None:
    """Write into the request context what the routes left in `request.state`."""
    state = scope["state"]
    context.caller = state.get("caller", context.caller)
    if body.seconds is not None:
        context.stages["body"] = body.seconds
    if (answer := state.get("answer")) is not None:
        context.note_answer(answer)
    if (error := state.get("error")) is not None:
        context.code, context.entries = error.code, ()


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
        "caller": context.caller.name,
        "key": context.caller.key,
        "row": context.batch_id,
    }
    return {**line, **{name: note for name, note in notes.items() if note}}
