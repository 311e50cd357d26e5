"""The outermost layer of every request: its id, its error answer, its headers, its log line and its metrics.

Pure ASGI, because Starlette's BaseHTTPMiddleware costs a task and two queues for each request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gateway.exchange import Exchange, request_id_of
from gateway.problems import from_exception, problem_response
from gateway.uploads import ClientGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx's word in logs and metrics for a caller who left; nobody is answered with it


class Envelope:
    """Wraps `app`; `finish` gets each request's scope and notes when its answer is out."""

    def __init__(
        self, app: ASGIApp, *, is_draining: Callable[[], bool], finish: Callable[[Scope, Exchange], None]
    ) -> None:
        self._app = app
        self._is_draining = is_draining
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens inside."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(request_id_of(scope))
        scope["gradserve"] = exchange

        async def send_enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = message.setdefault("headers", [])
                headers.append((b"x-request-id", exchange.request_id.encode("ascii")))
                headers.append((b"server-timing", exchange.server_timing().encode("ascii")))
                if self._is_draining():
                    headers.append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_enveloped)
        except ClientGoneError:
            exchange.status = CLIENT_GONE
        except Exception as exception:  # noqa: BLE001 — the one place where every failure becomes an answer
            await self._answer_error(exception, scope, receive, send_enveloped)
        finally:
            self._finish(scope, exchange)

    @staticmethod
    async def _answer_error(exception: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["gradserve"]
        error = from_exception(exception)
        exchange.code = error.code
        if error.code == "internal_error":
            logger.error("unhandled exception", exc_info=exception, extra={"request_id": exchange.request_id})
        if exchange.status:  # the answer has begun; nothing can be said any more
            raise exception
        await problem_response(error, exchange.request_id)(scope, receive, send)
