"""The pool of connections: one request at a time on each, and no answer is taken for that of another request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvloop

from gateway.inference import transport as transports
from gateway.inference.transport import PooledTransport

Talk = Callable[["Peer", Callable[[PooledTransport, str], Any]], Any]


class Peer:
    """A server that answers by `script`, one entry for each request of a connection, and counts its connections.

    An answer goes out in pieces, unless it `is_whole`; `is_early`, before the body is read.
    """

    is_whole = False
    is_early = False

    def __init__(self, *script: bytes) -> None:
        self.script = script
        self.connections = 0
        self.bodies: list[bytes] = []
        self.tasks: set[asyncio.Task[Any] | None] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        for said in self.script:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if not self.is_early:
                self.bodies.append(await reader.readexactly(size))
            step = len(said) if self.is_whole else 7
            for byte in range(0, len(said), step):
                if writer.is_closing():
                    break
                writer.write(said[byte : byte + step])
                await asyncio.sleep(0)
            if self.is_early:
                await asyncio.sleep(0.2)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def said(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"content-length: %d" % len(body), *headers, b"", body])


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def talk(request: pytest.FixtureRequest) -> Talk:
    """Return `talk(peer, scene)`, which returns the result of `scene` with a transport and the peer's address."""

    def talk(peer: Peer, scene: Callable[[PooledTransport, str], Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(converse(peer, scene))

    return talk


async def converse(peer: Peer, scene: Callable[[PooledTransport, str], Any]) -> Any:
    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    transport = PooledTransport()
    try:
        return await scene(transport, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    finally:
        await transport.aclose()
        server.close()
        await asyncio.gather(*filter(None, peer.tasks))


async def post(transport: PooledTransport, url: str, body: bytes) -> bytes:
    return (await transport.handle_async_request(httpx.Request("POST", url, content=body))).content


def test_calls_one_after_the_other_share_a_connection(talk: Talk) -> None:
    peer = Peer(said(b"one"), said(b"two"), said(b"three"))

    async def scene(transport: PooledTransport, url: str) -> list[bytes]:
        return [await post(transport, url, body) for body in (b"1", b"2", b"3")]

    assert talk(peer, scene) == [b"one", b"two", b"three"]
    assert (peer.connections, peer.bodies) == (1, [b"1", b"2", b"3"])


def test_calls_at_the_same_time_have_a_connection_each(talk: Talk) -> None:
    peer = Peer(said(b"one"))

    async def scene(transport: PooledTransport, url: str) -> list[bytes]:
        return await asyncio.gather(*(post(transport, url, b"x") for _ in range(20)))

    assert talk(peer, scene) == [b"one"] * 20
    assert peer.connections == 20


def test_a_connection_that_announces_its_end_or_is_closed_is_not_used_again(talk: Talk) -> None:
    for peer in (Peer(said(b"one", b"connection: close"), said(b"stale")), Peer(said(b"one"))):

        async def scene(transport: PooledTransport, url: str) -> list[bytes]:
            first = await post(transport, url, b"1")
            await asyncio.sleep(0.05)
            return [first, await post(transport, url, b"2")]

        assert talk(peer, scene) == [b"one", b"one"]
        assert peer.connections == 2


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("late", [said(b"late"), said(b"late")[:9], b"garbage"])
def test_unexpected_bytes_are_not_taken_for_an_answer(talk: Talk, late: bytes, is_whole: bool) -> None:
    peer = Peer(said(b"one") + late, said(b"never"))
    peer.is_whole = is_whole

    async def scene(transport: PooledTransport, url: str) -> list[bytes]:
        first = await post(transport, url, b"1")
        await asyncio.sleep(0.05)
        return [first, await post(transport, url, b"2")]

    assert talk(peer, scene) == [b"one", b"one"]


def test_a_connection_whose_request_was_answered_before_it_was_sent_is_not_used_again(talk: Talk) -> None:
    peer = Peer(said(b"too large"))
    peer.is_early = True

    async def scene(transport: PooledTransport, url: str) -> list[bytes]:
        first = await post(transport, url, bytes(50_000_000))
        peer.is_early = False
        return [first, await post(transport, url, b"2")]

    assert talk(peer, scene) == [b"too large"] * 2
    assert (peer.connections, peer.bodies) == (2, [b"2"])


def test_the_answer_to_a_cancelled_call_is_not_taken_for_the_next(talk: Talk) -> None:
    peer = Peer(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", b"two")

    async def scene(transport: PooledTransport, url: str) -> bytes:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await post(transport, url, b"1")
        peer.script = (said(b"own"),)
        return await post(transport, url, b"2")

    assert talk(peer, scene) == b"own"
    assert peer.connections == 2


def test_a_connection_that_was_idle_for_long_is_not_trusted(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "IDLE_S", 0.05)
    peer = Peer(said(b"one"), said(b"two"))

    async def scene(transport: PooledTransport, url: str) -> list[bytes]:
        first = await post(transport, url, b"1")
        await asyncio.sleep(0.1)
        return [first, await post(transport, url, b"2")]

    assert talk(peer, scene) == [b"one", b"one"]


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (httpx.Request("POST", "https://127.0.0.1:1/", content=b"x"), httpx.UnsupportedProtocol),
        (httpx.Request("POST", "http://a:1/", headers=[(b"x", b"1\r\ny: 2")], content=b"x"), httpx.LocalProtocolError),
        (httpx.Request("POST", "http://127.0.0.1:1/", content=b"x"), httpx.ConnectError),
    ],
)
def test_a_request_that_cannot_be_sent_raises_an_error_of_httpx_with_the_request(
    request_: httpx.Request, kind: type[httpx.TransportError]
) -> None:
    with pytest.raises(kind) as raised:
        asyncio.run(PooledTransport().handle_async_request(request_))
    assert raised.value.request is request_


def test_connecting_to_a_host_that_does_not_answer_ends_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "CONNECT_S", 0.1)

    async def scene() -> float:
        loop = asyncio.get_running_loop()
        with socket.socket() as listener, contextlib.ExitStack() as stack:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):  # with its queue full, the kernel says nothing to whoever comes
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            await asyncio.sleep(0.05)
            began = loop.time()
            with pytest.raises(httpx.ConnectTimeout):
                await transports.connect(listener.getsockname())
            return loop.time() - began

    assert uvloop.run(scene()) < 1.0
