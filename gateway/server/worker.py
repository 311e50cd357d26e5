"""Gunicorn's worker for the gateway: uvicorn on uvloop and httptools, with limits on callers and a clean stop.

After SIGTERM a worker reports not ready and asks its connections to close, but accepts and answers for `drain_s`. Then
it stops accepting, finishes its requests and exits.
"""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # has no types
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]  # has no types

from gateway.api.middleware import LATE_BODY_BYTES
from gateway.api.problems import raw_problem
from gateway.refusals import BadHttp, HeadersTooLarge
from gateway.request_context import new_request_id
from gateway.server.open_files import connection_limit

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from uvicorn.config import Config

    from gateway.state import AppState

# At the stop, the time in which a connection that has just been accepted may still send its first request.
LINGER_S = 1.0
# A header of three bytes takes two hundred bytes of memory.
MOST_HEADERS = 100
# Requests of one connection that may wait behind the one being answered: uvicorn keeps each with its headers.
MOST_PIPELINED = 8
# Heartbeats in half of the time after which Gunicorn takes a worker for hung, so that some may be late.
BEATS = 4
# The header by which a caller offers another protocol. With it httptools would take the body for that protocol.
OFFER = re.compile(rb"(?i)(?<=\r\n)upgrade(?=:)")


class GuardedProtocol(HttpToolsProtocol):
    """One connection; a request's line and headers must come within `header_timeout_s` and `max_header_bytes`.

    If the caller does not read an answer for `write_timeout_s`, the connection is aborted. If the process would hold
    more than `max_connections`, the one that has been idle longest is closed, else the new one.
    """

    idle: ClassVar[dict[GuardedProtocol, None]] = {}  # of the process; the one that has been idle longest is first
    header_timeout_s = 10.0
    write_timeout_s = 10.0
    max_header_bytes = 16 * 1024
    max_connections = 1000

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 — uvicorn's own
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0  # of headers or trailers: bytes read since the headers ended or the last part of a body
        self._parsed_bytes = 0  # of the request line and the headers that the parser has reported
        self._late_bytes = 0  # of a body after its request was answered
        self._wants_headers = True
        self._is_oversized = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the first request's timer, and make room for the connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called for the first unsent byte
        self._start_clock()
        if len(self.connections) > self.max_connections and not self.close_one_idle():
            self.transport.close()
        else:
            self._note_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_clock()
        self._stop_write_clock()
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and count the bytes of headers and trailers, which the parser does not limit."""
        if self._wants_headers:
            self._start_clock()
            data = hide_offer(data)
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes > self.max_header_bytes:
            self._is_oversized = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin to count a request's headers."""
        super().on_message_begin()
        self._wants_headers = True
        self._parsed_bytes = self._late_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > MOST_HEADERS:
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        """Stop the timer: the application limits the time for the body."""
        self._wants_headers = False
        self._header_bytes = 0
        self._stop_clock()
        self.idle.pop(self, None)
        if self.parser.should_upgrade():
            raise ValueError  # as in `_refuse_headers`: an offer that `hide_offer` did not find
        super().on_headers_complete()
        if len(self.pipeline) > MOST_PIPELINED:
            raise ValueError  # as above

    def on_body(self, body: bytes) -> None:
        """Take a part of the body. The application counts its bytes until it has answered."""
        self._header_bytes = 0
        if self.cycle.response_complete:
            self._late_bytes += len(body)
            if self._late_bytes > LATE_BODY_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the next request's headers: the body is complete."""
        self._wants_headers = True
        if self.cycle.response_complete:
            self._stop_clock()  # of a body that was answered before it was complete
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the timer if the answer came before the body was complete: uvicorn would wait without limit."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._start_clock()
        if self.cycle.response_complete:  # otherwise a pipelined request has begun
            self._note_idle()

    def pause_writing(self) -> None:
        """Start the timer of a caller who does not read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of `pause_writing`."""
        self._stop_write_clock()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 — uvicorn's sentence is not ours
        """Answer bytes that are no request, or have too many headers, by a problem document, and close."""
        if self.transport.is_closing():
            return
        error = HeadersTooLarge(self.max_header_bytes, MOST_HEADERS) if self._is_oversized else BadHttp()
        self._stop_clock()
        self.transport.write(raw_problem(error, new_request_id()))
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection after its request; one without any request yet may still send one for `LINGER_S`."""
        if self.cycle is None:
            self.loop.call_later(LINGER_S, self._close_if_idle)
        else:
            super().shutdown()

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > self.max_header_bytes:
            self._refuse_headers()

    def _refuse_headers(self) -> None:
        self._is_oversized = True
        raise ValueError  # httptools turns it into a parser error, for which uvicorn calls send_400_response

    def _start_clock(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._hang_up)

    def _stop_clock(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_clock(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _hang_up(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # a request of this connection is still being answered
            self._start_clock()

    def _note_idle(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = None

    @classmethod
    def close_one_idle(cls) -> bool:
        """Close the connection that has been idle longest, and return True if there was one."""
        for protocol in cls.idle:
            del cls.idle[protocol]
            protocol.transport.close()
            return True
        return False

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def hide_offer(data: bytes) -> bytes:
    """Return the bytes with the header of an offered upgrade renamed: it is ignored. Java's client offers h2c."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return OFFER.sub(b"ignored", head) + data[len(head) :] if OFFER.search(head) else data


class DrainingServer(Server):
    """Uvicorn's server, which only begins to drain at the first signal to stop."""

    def __init__(self, config: Config, state: AppState) -> None:
        super().__init__(config)
        self._state = state
        self._drained_at: float | None = None
        self._beating: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to send heartbeats, and start the application."""
        self._beating = asyncio.create_task(self._beat())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down, and then stop the heartbeats."""
        try:
            await super().shutdown(sockets)
        finally:
            if self._beating is not None:
                self._beating.cancel()

    async def _beat(self) -> None:
        """Send heartbeats to Gunicorn's master, timed by the event loop's monotonic clock.

        Uvicorn times its own by the wall clock: if that is set back by two minutes it sends none for two minutes, and
        the master kills all workers. It also sends none while it shuts down.
        """
        while self.config.callback_notify is not None:
            await self.config.callback_notify()
            await asyncio.sleep(self.config.timeout_notify / BEATS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second SIGINT stops at once."""
        if self._drained_at is None:
            self._state.is_draining = True
            self._drained_at = time.monotonic() + self._state.settings.drain_s
        elif sig == signal.SIGINT:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server should stop: the drain is over, or uvicorn's own condition holds."""
        if self._drained_at is not None and time.monotonic() >= self._drained_at:
            return True
        return await super().on_tick(counter)


class GatewayWorker(UvicornWorker):  # type: ignore[misc]
    """One gateway process under Gunicorn."""

    CONFIG_KWARGS: dict[str, Any] = {  # noqa: RUF012 — uvicorn-worker's own attribute
        "loop": "uvloop",
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "server_header": False,
    }

    def run(self) -> None:
        """Serve until the worker is told to stop."""
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self.serve())

    async def serve(self) -> None:
        """Serve the application on the sockets that the master has opened."""
        state: AppState = self.wsgi.state.gateway
        settings = state.settings
        self.config.app = self.wsgi
        self.config.http = type(
            "Protocol",
            (GuardedProtocol,),
            {
                "header_timeout_s": settings.header_timeout_s,
                "write_timeout_s": settings.body_timeout_s,
                "max_header_bytes": settings.max_header_bytes,
                "max_connections": connection_limit(settings.max_connections),
            },
        )
        # By default uvicorn trusts forwarded headers from 127.0.0.1.
        self.config.proxy_headers = bool(settings.trusted_proxies)
        self.config.timeout_graceful_shutdown = int(settings.timeout_s + settings.body_timeout_s) + 1
        server = DrainingServer(self.config, state)

        def quit_now() -> None:
            server.should_exit = server.force_exit = True

        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, quit_now)
        # The objects that exist now stay. A full garbage collection that visits them blocks every request for 40 ms.
        gc.collect()
        gc.freeze()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
