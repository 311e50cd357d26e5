"""Gunicorn's worker for the gateway: uvicorn on uvloop and httptools, with limits on slow callers and a clean stop.

After SIGTERM a worker reports not ready and asks its connections to close, but accepts and answers for `drain_s`. Then
it stops accepting, finishes its requests and exits.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # has no types
from httptools import HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]  # has no types

from gateway.api.problems import raw_problem
from gateway.inference.service import SharedState
from gateway.refusals import BadHttp, HeadersTooLarge
from gateway.request_context import new_request_id
from gateway.server.acceptor import Acceptor
from gateway.server.load_shedding import LoadShedder
from gateway.server.open_files import connection_limit
from gateway.server.shared_counters import SharedCounters

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable
    from types import FrameType

    from starlette.types import Scope
    from uvicorn._types import ASGI3Application
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from gateway.state import AppState

# At the stop, the time in which a connection that has just been accepted may still send its first request.
LINGER_S = 1.0
# A caller who is refused while sending a body reads the answer only after sending. So the rest of the body is read and
# dropped, up to these limits: closing at once would reset the connection, and the caller would lose the answer. nginx
# calls this lingering_close.
LATE_BODY_S = 10.0
LATE_BODY_BYTES = 64 * 1024 * 1024
# A header of three bytes takes two hundred bytes of memory.
MOST_HEADERS = 100
# A process that holds as many connections as it may closes one that has been idle for at least so long when a new one
# comes. A connection that was answered more recently may have its next request on the way.
IDLE_S = 1.0
# Requests of one connection that may wait behind the one being answered: uvicorn keeps each with its headers.
MOST_PIPELINED = 8
# Heartbeats in half of the time after which Gunicorn takes a worker for hung, so that some may be late.
BEATS = 4
# Refusals are sent in batches every 10 ms: a wake-up for each would cost more than the refusal. A caller who ignores
# Retry-After can then send only a hundred calls a second on a connection, not thousands.
REFUSE_EVERY_S = 0.01
# Made when Gunicorn's master imports this module, before it forks.
CONNECTIONS, INFERENCE = SharedCounters(), SharedState()


class CombiningTransport:
    """A transport that sends the data of two writes in one system call.

    Uvicorn writes an answer's head and body separately, and uvloop sends each at once: two system calls, each of which
    wakes the client. They took half of the CPU time for a refused call.
    """

    def __init__(self, transport: asyncio.Transport, is_receiving: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_receiving = is_receiving
        self._unsent: list[bytes] = []
        self.lingers = False

    def write(self, data: bytes) -> None:
        """Send `data` together with that of the next write, or in the next iteration of the event loop.

        The second write sends at once: before the next iteration the request would still be logged and counted.
        """
        self._unsent.append(data)
        if len(self._unsent) > 1:
            self._send()
        else:
            asyncio.get_running_loop().call_soon(self._send)

    def close(self) -> None:
        """Close the connection after the data is sent; if the caller is still sending, close only our direction."""
        self._send()
        if not self._is_receiving():
            self._transport.close()
        elif not self.is_closing():
            self.lingers = True
            if self._transport.can_write_eof():  # not with TLS
                self._transport.write_eof()

    def end(self) -> None:
        """Close the connection in both directions."""
        self._send()
        self._transport.close()

    def is_closing(self) -> bool:
        """Return True if nothing more can be sent."""
        return self.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 — any attribute of the transport
        return getattr(self._transport, name)

    def _send(self) -> None:
        # Uvloop raises for a write to a lost connection, which is no error of the answer.
        if self._unsent and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()


class BatchedCalls:
    """Collects callbacks, and calls all of them `within_s` seconds after the first was added."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._waiting: list[Callable[[], None]] = []

    def add(self, call: Callable[[], None]) -> None:
        """Add a callback."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(self._within_s, self._run)
        self._waiting.append(call)

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()


class RestOfRequest:
    """Callbacks for a second parser, which gets a request's headers again; only later events reach `protocol`."""

    def __init__(self, protocol: GuardedProtocol) -> None:
        self.is_past_headers = False
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete
        for name in ("on_message_begin", "on_url", "on_header", "on_headers_complete"):
            setattr(self, name, self._later(getattr(protocol, name)))

    def _later(self, callback: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: bytes) -> None:
            if self.is_past_headers:
                callback(*arguments)

        return call


class GuardedProtocol(HttpToolsProtocol):
    """One connection; a request's line and headers must come within `header_timeout_s` and `max_header_bytes`.

    If the caller does not read an answer for `write_timeout_s`, the connection is aborted. If `refuse` returns an
    answer for a call, the application is not called.
    """

    refuse: Callable[[Scope, Iterable[tuple[bytes, bytes]]], bytes | None] | None = None
    refusals = BatchedCalls(REFUSE_EVERY_S)  # of all connections of the process
    # The idle connections of the process and the times since when; the one that has been idle longest is first.
    idle: ClassVar[dict[GuardedProtocol, float]] = {}
    header_timeout_s = 10.0
    write_timeout_s = 10.0
    max_header_bytes = 16 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 — uvicorn's own
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0  # of headers or trailers: bytes read since the headers ended or the last part of a body
        self._parsed_bytes = 0  # of the request line and the headers that the parser has reported
        self._wants_headers = True
        self._is_oversized = False
        self._offers_upgrade = False
        self._is_bad = False
        self._late_bytes = 0
        self._late_timer: asyncio.TimerHandle | None = None
        self._read = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the first request's timer."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called for the first unsent byte
        self._out = CombiningTransport(transport, self._is_receiving)
        self.transport = self._out  # type: ignore[assignment]  # has the parts of the interface that uvicorn uses
        self._start_clock()
        self._note_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_clock()
        self._stop_write_clock()
        self.idle.pop(self, None)
        if self._late_timer is not None:
            self._late_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and count the bytes of headers and trailers, which the parser does not limit."""
        if self._is_bad:
            self._drop(data)  # what follows a request that cannot be parsed
            return
        if self._wants_headers:
            self._start_clock()
        self._header_bytes += len(data)
        self._read = data
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
        super().on_headers_complete()
        self._offers_upgrade = self.parser.should_upgrade()
        if len(self.pipeline) > MOST_PIPELINED:
            raise ValueError  # as in `_refuse_headers`

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, whose bytes the application counts."""
        self._header_bytes = 0
        if self.cycle.response_complete:
            self._drop(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect the next request's headers: the body is complete."""
        if self._offers_upgrade:
            return  # the parser takes the following bytes for another protocol; see `_unsupported_upgrade_warning`
        self._wants_headers = True
        if self.cycle.response_complete:
            self._stop_clock()  # of a body that was answered before it was complete
            if self._out.lingers:
                self._out.end()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the timer if the answer came before the body was complete: uvicorn would wait without limit."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._start_clock()
        if self.cycle.response_complete:  # otherwise a pipelined request has begun
            self._note_idle()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self.transport.is_closing():
            return  # a pipelined request behind one whose answer closes the connection
        content = None
        if self.refuse is not None and cycle.keep_alive:
            content = self.refuse(cycle.scope, cycle.default_headers)  # type: ignore[arg-type]  # uvicorn's word for it
        if content is None:
            super()._start_asgi_task(cycle, app)
            return
        cycle.response_started = True
        self.refusals.add(partial(self._send_refusal, cycle, content))

    def _send_refusal(self, cycle: RequestResponseCycle, content: bytes) -> None:
        if self.transport.is_closing():
            return
        cycle.response_complete = True
        self.transport.write(content)
        if cycle.keep_alive:
            self.on_response_complete()
        else:  # `shutdown` was called since the refusal
            self.transport.close()

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
            self._out.end()
            return
        error = HeadersTooLarge(self.max_header_bytes, MOST_HEADERS) if self._is_oversized else BadHttp()
        self._stop_clock()
        self._is_bad = True
        self.transport.write(raw_problem(error, new_request_id()))
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection after its request; one without any request yet may still send one for `LINGER_S`."""
        if self.cycle is None:
            self.loop.call_later(LINGER_S, self._close_if_idle)
        else:
            super().shutdown()

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore an offered upgrade and answer the request; Java's client offers h2c.

        Uvicorn calls this when the parser has stopped at the end of the headers, and would then take the body for a
        new request. So a new parser gets the headers with the body's length, and parses the rest.
        """
        self._offers_upgrade = False
        stopped_at: int = sys.exception().args[0]  # type: ignore[union-attr]  # httptools' HttpParserUpgrade
        framing = {b"content-length", b"transfer-encoding"}
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] in framing]
        rest = RestOfRequest(self)
        self.parser = HttpRequestParser(rest)
        version = self.scope["http_version"].encode()
        self.parser.feed_data(b"POST / HTTP/%b\r\n%b\r\n" % (version, b"".join(lines)))
        rest.is_past_headers = True
        self._read = self._read[stopped_at:]
        super().data_received(self._read)

    def _is_receiving(self) -> bool:
        """Return True if the caller may still be sending; the bytes are then dropped, at most for `LATE_BODY_S`."""
        is_receiving = self._is_bad or (self.cycle is not None and self.cycle.more_body)
        if is_receiving and self._late_timer is None and not self.transport.is_closing():
            self._late_timer = self.loop.call_later(LATE_BODY_S, self._out.end)
            self.flow.resume_reading()
        return is_receiving

    def _drop(self, data: bytes) -> None:
        self._late_bytes += len(data)
        if self._late_bytes > LATE_BODY_BYTES:
            self._out.end()

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
            self._out.end()
        else:  # a request of this connection is still being answered
            self._start_clock()

    def _note_idle(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = self.loop.time()

    @classmethod
    def close_one_idle(cls) -> bool:
        """Close the connection that has been idle longest, at least for `IDLE_S`, and return True if there was one."""
        for protocol, since in cls.idle.items():
            if protocol.loop.time() - since < IDLE_S:
                break
            del cls.idle[protocol]
            protocol._out.end()  # noqa: SLF001 — of the same class
            return True
        return False

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class DrainingServer(Server):
    """Uvicorn's server, which only begins to drain at the first signal to stop."""

    def __init__(self, config: Config, state: AppState, slot: int) -> None:
        super().__init__(config)
        self._state = state
        self._slot = slot
        self._acceptors: list[Acceptor] = []
        self._drained_at: float | None = None
        self._beating: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept from the sockets."""
        self._beating = asyncio.create_task(self._beat())
        await super().startup(sockets=[])  # without sockets, because uvicorn would accept from them itself

        def make_protocol() -> asyncio.Protocol:
            protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return protocol

        self._acceptors = [
            Acceptor(
                listener,
                make_protocol,
                self.server_state.connections,
                most_connections=connection_limit(self._state.settings.max_connections),
                make_room=GuardedProtocol.close_one_idle,
                counters=CONNECTIONS,
                slot=self._slot,
                ssl=self.config.ssl,
            )
            for listener in sockets or []
        ]
        self.servers.extend(self._acceptors)  # type: ignore[arg-type]  # have what uvicorn uses of a server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, wait for connections that are being accepted, then let uvicorn shut all of them down."""
        for server in self.servers:
            server.close()
            await server.wait_closed()
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
        for acceptor in self._acceptors:
            acceptor.publish_count()  # some connections may have been closed
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

    async def _serve(self) -> None:
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
                "refuse": staticmethod(LoadShedder(state).answer),
            },
        )
        # By default uvicorn trusts forwarded headers from 127.0.0.1.
        self.config.proxy_headers = bool(settings.trusted_proxies)
        self.config.timeout_graceful_shutdown = int(settings.timeout_s + settings.body_timeout_s) + 1
        server = DrainingServer(self.config, state, slot=self.age)
        state.service.join(INFERENCE, self.age)

        def quit_now() -> None:
            server.should_exit = server.force_exit = True

        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, quit_now)
        # The objects that exist now stay. A full garbage collection that visits them blocks every request for 40 ms.
        gc.collect()
        gc.freeze()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
