"""Gunicorn's worker for the gateway: uvicorn on uvloop and httptools that cuts off who dawdles and stops without loss.

After SIGTERM a worker says not ready and asks its connections to close, but goes on accepting and answering for
`drain_s`; then it accepts no more, finishes what it has and ends.
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

# A connection that was accepted just before the end may have its request on the way; it gets this long to say it.
LINGER_S = 1.0
# Who is answered while still sending reads the answer only afterwards: what is sent is read and dropped, up to so much.
# To close at once would reset the connection, and the answer would be lost. nginx calls it lingering_close.
LATE_BODY_S = 10.0
LATE_BODY_BYTES = 64 * 1024 * 1024
# A header of three bytes takes two hundred of memory.
MOST_HEADERS = 100
# A process that is full of connections ends one on which nothing was asked for so long when somebody else comes. One
# that has just been answered may have its next request on the way.
IDLE_S = 1.0
# Requests of one connection that may wait behind the one being answered: uvicorn keeps each with its headers.
MOST_PIPELINED = 8
# Beats in half of the time after which Gunicorn takes a worker for hung: one that comes late costs nothing.
BEATS = 4
# Callers without a place hear so together: a wake-up for each would cost more than the refusal. And who asks again at
# once, heedless of Retry-After, can do so a hundred times a second on a connection, not thousands of times.
REFUSE_EVERY_S = 0.01
# Gunicorn's master imports this file, and then forks.
CONNECTIONS, INFERENCE = SharedCounters(), SharedState()


class OneWrite:
    """A transport that sends what two calls write at once.

    Uvicorn writes an answer's head and its body one after the other, and uvloop sends each as it comes: two system
    calls, of which each wakes the client. They were half of what it costs to refuse a call.
    """

    def __init__(self, transport: asyncio.Transport, is_sent_to: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_sent_to = is_sent_to
        self._unsent: list[bytes] = []
        self.lingers = False

    def write(self, data: bytes) -> None:
        """Sends `data` with what is written next, or when the loop turns if nothing is.

        The second call does not wait for the turn: before it, the request is still logged and counted.
        """
        self._unsent.append(data)
        if len(self._unsent) > 1:
            self._send()
        else:
            asyncio.get_running_loop().call_soon(self._send)

    def close(self) -> None:
        """Close the connection after what was written; only our half of it while the caller is still sending."""
        self._send()
        if not self._is_sent_to():
            self._transport.close()
        elif not self.is_closing():
            self.lingers = True
            if self._transport.can_write_eof():  # not with TLS
                self._transport.write_eof()

    def end(self) -> None:
        """Close the whole connection, whatever still comes."""
        self._send()
        self._transport.close()

    def is_closing(self) -> bool:
        """Return True if nothing more can be said."""
        return self.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 — whatever a transport has
        return getattr(self._transport, name)

    def _send(self) -> None:
        # To a connection that is lost uvloop raises, and not to speak to it is no fault of the answer.
        if self._unsent and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()


class Together:
    """Calls what it is given within `within_s`, all at once."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._waiting: list[Callable[[], None]] = []

    def add(self, call: Callable[[], None]) -> None:
        """Sees to it that `call` is called."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(self._within_s, self._run)
        self._waiting.append(call)

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()


class RestOfRequest:
    """Hears a parser that is told a request's headers a second time, and passes on what comes after them."""

    def __init__(self, protocol: GuardedProtocol) -> None:
        self.is_past_headers = False
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete
        for name in ("on_message_begin", "on_url", "on_header", "on_headers_complete"):
            setattr(self, name, self._later(getattr(protocol, name)))

    def _later(self, callback: Callable[..., None]) -> Callable[..., None]:
        def call(*told: bytes) -> None:
            if self.is_past_headers:
                callback(*told)

        return call


class GuardedProtocol(HttpToolsProtocol):
    """One connection; a request's line and headers must come within `header_timeout_s` and `max_header_bytes`.

    An answer that its caller does not read for `write_timeout_s` is given up. A call that `refuse` has an answer for
    does not get to the application.
    """

    refuse: Callable[[Scope, Iterable[tuple[bytes, bytes]]], bytes | None] | None = None
    refusals = Together(REFUSE_EVERY_S)  # of all connections of the process
    # All connections of the process that nobody asks anything on, and since when; the one that is so longest is first.
    idle: ClassVar[dict[GuardedProtocol, float]] = {}
    header_timeout_s = 10.0
    write_timeout_s = 10.0
    max_header_bytes = 16 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 — uvicorn's own
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0  # of the reads since headers ended or a body's part came: headers, or trailers
        self._seen_bytes = 0  # of the parts that the parser has told
        self._wants_headers = True
        self._is_oversized = False
        self._offers_upgrade = False
        self._is_bad = False
        self._late_bytes = 0
        self._late_timer: asyncio.TimerHandle | None = None
        self._read = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the first request's clock."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # the clock of `pause_writing` begins with the first unsent byte
        self._out = OneWrite(transport, self._is_sent_to)
        self.transport = self._out  # type: ignore[assignment]  # as good as one for all that uvicorn does
        self._start_clock()
        self._note_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._stop_clock()
        self._stop_write_clock()
        self.idle.pop(self, None)
        if self._late_timer is not None:
            self._late_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, and counts what is no body: the parser keeps headers and trailers without bound."""
        if self._is_bad:
            self._drop(data)  # no parser can tell where it ends
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
        """Begins to count a request's headers."""
        super().on_message_begin()
        self._wants_headers = True
        self._seen_bytes = self._late_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Counts the request's line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts a header."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > MOST_HEADERS:
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        """Stops the clock: from here on the application watches the body."""
        self._wants_headers = False
        self._header_bytes = 0
        self._stop_clock()
        self.idle.pop(self, None)
        super().on_headers_complete()
        self._offers_upgrade = self.parser.should_upgrade()
        if len(self.pipeline) > MOST_PIPELINED:
            raise ValueError  # as in `_refuse_headers`

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body, which the application counts."""
        self._header_bytes = 0
        if self.cycle.response_complete:
            self._drop(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expects the next request's headers: the body is whole."""
        if self._offers_upgrade:
            return  # the parser believes that what follows is another protocol; see `_unsupported_upgrade_warning`
        self._wants_headers = True
        if self.cycle.response_complete:
            self._stop_clock()  # of a body whose answer came first
            if self._out.lingers:
                self._out.end()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Starts the clock where the answer came before the body was whole: uvicorn would wait for ever."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._start_clock()
        if self.cycle.response_complete:  # else a request that came with the last one has begun
            self._note_idle()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self.transport.is_closing():
            return  # it came behind a request whose answer ends the connection
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
        else:  # since it was refused, `shutdown` has asked for the connection's end
            self.transport.close()

    def pause_writing(self) -> None:
        """Starts the clock of a caller who does not read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops it."""
        self._stop_write_clock()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 — uvicorn's sentence is not ours
        """Answers what is no request in the one shape that errors have, and hangs up."""
        if self.transport.is_closing():
            self._out.end()
            return
        error = HeadersTooLarge(self.max_header_bytes, MOST_HEADERS) if self._is_oversized else BadHttp()
        self._stop_clock()
        self._is_bad = True
        self.transport.write(raw_problem(error, new_request_id()))
        self.transport.close()

    def shutdown(self) -> None:
        """Ends the connection after its request; one that has not asked anything yet may still do so for a moment."""
        if self.cycle is None:
            self.loop.call_later(LINGER_S, self._close_if_idle)
        else:
            super().shutdown()

    def _unsupported_upgrade_warning(self) -> None:
        """Reads on: a request that offers an upgrade is answered as it is. Java's client offers h2c.

        Uvicorn calls this where the parser has stopped, at the end of the headers, and would take the body for a
        request of its own. So a new parser hears how long the body is, and goes on.
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

    def _is_sent_to(self) -> bool:
        """Return True if the caller may still be sending what was refused; it is then read and dropped for a while."""
        is_sent_to = self._is_bad or (self.cycle is not None and self.cycle.more_body)
        if is_sent_to and self._late_timer is None and not self.transport.is_closing():
            self._late_timer = self.loop.call_later(LATE_BODY_S, self._out.end)
            self.flow.resume_reading()
        return is_sent_to

    def _drop(self, data: bytes) -> None:
        self._late_bytes += len(data)
        if self._late_bytes > LATE_BODY_BYTES:
            self._out.end()

    def _count(self, size: int) -> None:
        self._seen_bytes += size
        if self._seen_bytes > self.max_header_bytes:
            self._refuse_headers()

    def _refuse_headers(self) -> None:
        self._is_oversized = True
        raise ValueError  # httptools makes it a parser error, uvicorn calls send_400_response

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
        else:  # an earlier request of this connection is still being answered
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
            protocol._out.end()  # noqa: SLF001 — one of its own class
            return True
        return False

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class DrainingServer(Server):
    """Uvicorn's server, which at the first signal to stop only begins to drain."""

    def __init__(self, config: Config, parts: AppState, seat: int) -> None:
        super().__init__(config)
        self._parts = parts
        self._seat = seat
        self._acceptors: list[Acceptor] = []
        self._drained_at: float | None = None
        self._beating: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application, then accepts from the sockets."""
        self._beating = asyncio.create_task(self._beat())
        await super().startup(sockets=[])  # or uvicorn would accept from them itself

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
                most_connections=connection_limit(self._parts.settings.max_connections),
                make_room=GuardedProtocol.close_one_idle,
                counters=CONNECTIONS,
                seat=self._seat,
                ssl=self.config.ssl,
            )
            for listener in sockets or []
        ]
        self.servers.extend(self._acceptors)  # type: ignore[arg-type]  # as good as servers for all that uvicorn does

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more; what is just being accepted is a connection before uvicorn ends all there are."""
        for server in self.servers:
            server.close()
            await server.wait_closed()
        try:
            await super().shutdown(sockets)
        finally:
            if self._beating is not None:
                self._beating.cancel()

    async def _beat(self) -> None:
        """Tell Gunicorn's master that this worker lives, by the loop's monotonic clock.

        Uvicorn tells it by the wall clock: after that was set back by two minutes it says nothing for as long, and the
        master kills all workers. Nor does it tell anything while it shuts down.
        """
        while self.config.callback_notify is not None:
            await self.config.callback_notify()
            await asyncio.sleep(self.config.timeout_notify / BEATS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second SIGINT ends at once."""
        if self._drained_at is None:
            self._parts.is_draining = True
            self._drained_at = time.monotonic() + self._parts.settings.drain_s
        elif sig == signal.SIGINT:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop accepting: the drain is over, or uvicorn has a reason of its own."""
        if self._drained_at is not None and time.monotonic() >= self._drained_at:
            return True
        for acceptor in self._acceptors:
            acceptor.note()  # of connections that have ended
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
        parts: AppState = self.wsgi.state.gateway
        settings = parts.settings
        self.config.app = self.wsgi
        self.config.http = type(
            "Protocol",
            (GuardedProtocol,),
            {
                "header_timeout_s": settings.header_timeout_s,
                "write_timeout_s": settings.body_timeout_s,
                "max_header_bytes": settings.max_header_bytes,
                "refuse": staticmethod(LoadShedder(parts).answer),
            },
        )
        # Uvicorn trusts 127.0.0.1's forwarded headers unless told otherwise.
        self.config.proxy_headers = bool(settings.trusted_proxies)
        self.config.timeout_graceful_shutdown = int(settings.timeout_s + settings.body_timeout_s) + 1
        server = DrainingServer(self.config, parts, seat=self.age)
        parts.service.join(INFERENCE, self.age)

        def quit_now() -> None:
            server.should_exit = server.force_exit = True

        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, quit_now)
        # What is there by now stays. To look at all of it in each full collection stops every request for 40 ms.
        gc.collect()
        gc.freeze()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
