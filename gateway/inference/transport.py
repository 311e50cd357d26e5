"""A pool of connections to TorchServe behind httpx's transport interface, with httptools as the parser.

With httpx's own pool the gateway answers fewer calls: at 8, 24, 32, 48 and 100 clients 0.89, 0.88, 0.88, 1.01 and 0.75
of the requests/s (medians of 4 rounds on 2 cores, benchmarks/results/mechanisms.json). TorchServe's answers are small
and are always read whole, so a pool needs little of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from typing import TypeAlias

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

# A connection that was idle for longer is not used again, because firewalls drop idle connections silently.
IDLE_S = 60.0
# A host that is down does not refuse a connection; the attempt would last until the deadline.
CONNECT_S = 1.0
Origin: TypeAlias = tuple[str, int]


class PooledTransport(httpx.AsyncBaseTransport):
    """A transport that reuses connections; it supports plain HTTP, and reads response bodies into memory.

    It has no read timeout, because callers have deadlines, and no limit on connections, because admission limits the
    calls in flight.
    """

    def __init__(self) -> None:
        self._idle: defaultdict[Origin, deque[Connection]] = defaultdict(deque)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return the response.

        Raises:
            httpx.TransportError: the request failed.
        """
        if request.url.scheme != "http":
            raise httpx.UnsupportedProtocol(f"no plain HTTP: {request.url.scheme}", request=request)
        origin = (request.url.host, request.url.port or 80)
        message = (serialise_head(request), request.content)
        connection = self._take(origin)
        try:
            if connection is None:
                connection = await connect(origin)
            status, content = await connection.send(message)
        except httpx.TransportError as error:
            error.request = request
            raise
        self._keep(origin, connection)
        return httpx.Response(status, content=content, request=request)

    async def aclose(self) -> None:
        """Close the idle connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    def _take(self, origin: Origin) -> Connection | None:
        """Return the open connection to `origin` that was used last; None if there is none."""
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
        for connections in self._idle.values():  # of all origins: one that is down gets no more requests
            while connections and connections[0].idle_since <= now - IDLE_S:
                connections.popleft().close()


class Connection(asyncio.Protocol):
    """One connection, with at most one request in flight."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser: HttpResponseParser | None = None
        self._parts: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """True if a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, message: tuple[bytes, bytes]) -> tuple[int, bytes]:
        """Send a request's head and body, and return the response's status and body.

        Raises:
            httpx.ReadError: the connection was closed before the response was complete.
            httpx.RemoteProtocolError: the bytes are no HTTP response.
        """
        assert self._transport is not None  # noqa: S101 — `connect` has waited for it
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = HttpResponseParser(self)
        self._parts = []
        self._transport.writelines(message)  # in one system call, without a copy
        try:
            return await self._answer
        except BaseException:
            self.close()  # otherwise a late response would be taken for that of the next request
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's class is no subclass of asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 — asyncio's signature
        """Fail the request in flight."""
        self._fail(httpx.ReadError("the connection was closed before the response was complete"))

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        try:
            if self._parser is None:
                self.close()  # no request is in flight
            else:
                self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self.close()  # also if a complete response came before these bytes
            self._fail(httpx.RemoteProtocolError("no HTTP response"))

    def on_message_begin(self) -> None:
        """Close the connection if a second response begins."""
        if self._parser is None:
            self.close()

    def on_body(self, part: bytes) -> None:
        """Keep a part of the response body."""
        self._parts.append(part)

    def on_message_complete(self) -> None:
        """Complete the request in flight."""
        parser, self._parser = self._parser, None
        if parser is None or self._answer is None or self._answer.done():
            self.close()  # the request was cancelled, or this is a second response
            return
        # A response may come before the whole request is sent, if TorchServe refuses its size.
        if self._transport is None or self._transport.get_write_buffer_size() or not parser.should_keep_alive():
            self.close()
        self._answer.set_result((parser.get_status_code(), b"".join(self._parts)))
        self._parts = []

    def _fail(self, error: httpx.TransportError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


async def connect(origin: Origin) -> Connection:
    """Return a new connection.

    Raises:
        httpx.ConnectError: the connection was refused or failed.
        httpx.ConnectTimeout: the connection was not made within `CONNECT_S`.
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
    """Return the request's line and headers in HTTP/1.1.

    Raises:
        httpx.LocalProtocolError: a header has a line break.
    """
    headers = request.headers.raw
    lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in headers]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(headers) or head.count(b"\r") != len(headers):
        raise httpx.LocalProtocolError("a header has a line break", request=request)
    return head + b"\r\n\r\n"
