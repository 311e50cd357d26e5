"""One pool of connections to TorchServe behind httpx's transport interface, on the parser that reads callers' requests.

httpx's own pool collapses under concurrency, and a whole client library (aiohttp) takes three times the processor time:
0.1 ms more for each call, 0.2 when the model has taken the caches. TorchServe's answers are small, have a length and
are always wanted whole, so little is left of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from typing import TypeAlias

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

# Firewalls forget connections on which nothing is said.
IDLE_S = 60.0
# A host that is gone refuses nothing: its connections are never made.
CONNECT_S = 1.0
Origin: TypeAlias = tuple[str, int]


class PooledTransport(httpx.AsyncBaseTransport):
    """Sends requests over kept connections and gives answers whole; plain HTTP, bodies in memory.

    It has no timeouts, because the caller has a deadline, and no bound, because admission bounds the calls in flight.
    """

    def __init__(self) -> None:
        self._idle: defaultdict[Origin, deque[Connection]] = defaultdict(deque)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer to `request`.

        Raises:
            httpx.TransportError: there is none.
        """
        if request.url.scheme != "http":
            raise httpx.UnsupportedProtocol(f"no plain HTTP: {request.url.scheme}", request=request)
        origin = (request.url.host, request.url.port or 80)
        message = (serialise_head(request), request.content)
        connection = self._take(origin)
        try:
            if connection is None:
                connection = await connect(origin)
            status, content = await connection.ask(message)
        except httpx.TransportError as error:
            error.request = request
            raise
        self._keep(origin, connection)
        return httpx.Response(status, content=content, request=request)

    async def aclose(self) -> None:
        """Closes the connections that nobody uses."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    def _take(self, origin: Origin) -> Connection | None:
        """The open connection to `origin` that was used last."""
        connections = self._idle[origin]
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while connections:
            connection = connections.pop()
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    def _keep(self, origin: Origin, connection: Connection) -> None:
        connection.idle_since = now = asyncio.get_running_loop().time()
        if connection.is_open:
            self._idle[origin].append(connection)
        for connections in self._idle.values():  # other origins' too: one that is gone is not asked again
            while connections and connections[0].idle_since <= now - IDLE_S:
                connections.popleft().close()


class Connection(asyncio.Protocol):
    """One connection, with at most one request on its way."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser: HttpResponseParser | None = None
        self._parts: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, message: tuple[bytes, bytes]) -> tuple[int, bytes]:
        """Sends a request's head and body, and gives the answer's status and body.

        Raises:
            httpx.ReadError: the connection ended first.
            httpx.RemoteProtocolError: what came is no answer.
        """
        assert self._transport is not None  # noqa: S101 — `connect` has waited for it
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = HttpResponseParser(self)
        self._parts = []
        self._transport.writelines(message)  # in one system call, without a copy
        try:
            return await self._answer
        except BaseException:
            self.close()  # or what may still come would be taken for the next request's answer
            raise

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's is one without being its subclass

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 — asyncio's signature
        """A request on its way has no answer."""
        self._fail(httpx.ReadError("the connection ended before the answer"))

    def data_received(self, data: bytes) -> None:
        """Feeds the parser."""
        try:
            if self._parser is None:
                self.close()  # nobody asked
            else:
                self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self.close()  # also where a whole answer came before it
            self._fail(httpx.RemoteProtocolError("no HTTP answer"))

    def on_message_begin(self) -> None:
        """Ends the connection when an answer begins behind the one that was asked for."""
        if self._parser is None:
            self.close()

    def on_body(self, part: bytes) -> None:
        """Takes a part of the answer's body from the parser."""
        self._parts.append(part)

    def on_message_complete(self) -> None:
        """Gives the answer to who waits for it."""
        parser, self._parser = self._parser, None
        if parser is None or self._answer is None or self._answer.done():
            self.close()  # nobody waits any more, or a second answer came
            return
        # An answer may come before the request has gone, when it is refused for its size.
        if self._transport is None or self._transport.get_write_buffer_size() or not parser.should_keep_alive():
            self.close()
        self._answer.set_result((parser.get_status_code(), b"".join(self._parts)))
        self._parts = []

    def _fail(self, error: httpx.TransportError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


async def connect(origin: Origin) -> Connection:
    """A new connection.

    Raises:
        httpx.ConnectError: there is none.
        httpx.ConnectTimeout: there is none after `CONNECT_S`.
    """
    try:
        async with asyncio.timeout(CONNECT_S):
            _, connection = await asyncio.get_running_loop().create_connection(Connection, *origin)
    except TimeoutError as error:
        raise httpx.ConnectTimeout(type(error).__name__) from error
    except OSError as error:
        raise httpx.ConnectError(type(error).__name__) from error
    return connection


def serialise_head(request: httpx.Request) -> bytes:
    """The request's line and headers in HTTP/1.1.

    Raises:
        httpx.LocalProtocolError: a header would break it.
    """
    headers = request.headers.raw
    lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in headers]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(headers) or head.count(b"\r") != len(headers):
        raise httpx.LocalProtocolError("a header holds the end of a line", request=request)
    return head + b"\r\n\r\n"
