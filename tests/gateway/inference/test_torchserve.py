"""The client of TorchServe: every error is translated, and the transport raises httpx's exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvloop

from contracts.wire import Options
from gateway.errors import DeadlinePassed, EngineBroke, EngineNonsense, GatewayError, Unavailable
from gateway.inference import transport as transports
from gateway.inference.replicas import Replica
from gateway.inference.routing import Target
from gateway.inference.torchserve import Deadline, TorchServe, translate_transport_error
from gateway.inference.transport import PooledTransport

ANSWER = b'{"results":[{"class":"cat","confidence":0.9,"top":[]}]}'


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize("kind", sorted({httpx.TransportError, *subclasses(httpx.TransportError)}, key=str))
def test_every_transport_error_of_httpx_is_translated(kind: type[httpx.TransportError]) -> None:
    error = translate_transport_error(kind("a secret"))
    assert isinstance(error, GatewayError)
    assert error.status in {502, 503}
    assert "secret" not in error.detail


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]
Talk = Callable[["Peer", Callable[[PooledTransport, str], Any]], Any]


def call(serve: Serve | None, *, timeout_s: float = 5.0, image: bytes = b"x") -> tuple[Any, list[bytes]]:
    """Return the result or error of one call over a real socket, and the heads of the requests that the server got."""
    heads: list[bytes] = []

    async def scene() -> Any:
        served: set[asyncio.Task[Any] | None] = set()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert serve is not None
            served.add(asyncio.current_task())
            head = await reader.readuntil(b"\r\n\r\n")
            heads.append(head)
            size = int(next(line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length" in line))
            await reader.readexactly(size)
            await serve(reader, writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if serve is None:
            server.close()
            await server.wait_closed()
        transport = PooledTransport()
        try:
            target = Target(Replica("http://agent"), f"http://127.0.0.1:{port}", "cifar10", "1.0.0", 1)
            deadline = Deadline(timeout_s)
            return await TorchServe(transport).predict(
                target, [image], carried=Options("r"), deadline=deadline, top_k=1
            )
        except GatewayError as error:
            return error
        finally:
            await transport.aclose()
            server.close()
            await asyncio.gather(*filter(None, served))

    return asyncio.run(scene()), heads


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the connection without an answer."""


async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{")


async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 smtp.example ready\r\n\r\n")


async def sleep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)


def test_a_call_carries_two_headers_of_ours_and_nothing_else() -> None:
    entries, heads = call(answer)
    assert entries[0]["class"] == "cat"
    line, *headers = heads[0].decode().strip().split("\r\n")
    assert line == "POST /predictions/cifar10/1.0.0 HTTP/1.1"
    named = {name.lower(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
    assert set(named) == {"host", "content-length", "content-type", "x-gradserve"}
    assert set(json.loads(named["x-gradserve"])) == {"id", "deadline"}


def test_a_large_image_is_carried_whole() -> None:
    entries, heads = call(answer, image=b"x" * 3_000_000)
    assert entries[0]["class"] == "cat"
    assert b"3000000" in heads[0]


@pytest.mark.parametrize(
    ("serve", "kind"),
    [(None, Unavailable), (hang_up, EngineBroke), (cut_off, EngineBroke), (babble, EngineNonsense)],
)
def test_a_failing_socket_is_translated(serve: Serve | None, kind: type[GatewayError]) -> None:
    assert isinstance(call(serve)[0], kind)


def test_a_call_whose_deadline_has_passed_is_not_begun() -> None:
    error, heads = call(answer, timeout_s=-0.1)
    assert isinstance(error, DeadlinePassed)
    assert heads == []


def test_a_call_to_a_silent_torchserve_ends_at_the_deadline() -> None:
    assert isinstance(call(sleep, timeout_s=0.1)[0], DeadlinePassed)


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
