"""The wire to TorchServe and its failures: the error map is exhaustive, the transport speaks httpx's words."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import httpx
import pytest

from gateway.agents import Replica
from gateway.errors import DeadlinePassed, EngineBroke, EngineNonsense, GatewayError, Unavailable
from gateway.torchserve import Deadline, TorchServe, join_frames, translate_transport_error
from gateway.transport import ERRORS, PooledTransport
from gateway.versions import Target

ANSWER = b'{"results":[{"class":"cat","confidence":0.9,"top":[]}]}'


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize("kind", sorted({httpx.TransportError, *subclasses(httpx.TransportError)}, key=str))
def test_every_transport_error_of_httpx_has_its_answer(kind: type[httpx.TransportError]) -> None:
    error = translate_transport_error(kind("a secret"))
    assert isinstance(error, GatewayError)
    assert error.status in {502, 503}
    assert "secret" not in error.detail


@pytest.mark.parametrize("kind", sorted({aiohttp.ClientError, *subclasses(aiohttp.ClientError)}, key=str))
def test_every_error_of_aiohttp_becomes_one_of_httpx(kind: type[aiohttp.ClientError]) -> None:
    assert any(base in ERRORS for base in kind.__mro__)


def test_frames_are_big_endian_lengths_and_bytes() -> None:
    assert join_frames([b"ab", b"", b"c"]) == b"\0\0\0\2ab\0\0\0\0\0\0\0\1c"


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def call(serve: Serve | None, *, timeout_s: float = 5.0, image: bytes = b"x") -> tuple[Any, list[bytes]]:
    """What one call over a real socket gives, or its error; and the heads of the requests that came."""
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
            return await TorchServe(transport).predict(target, [image], carried={"id": "r"}, deadline=deadline, top_k=1)
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
    """Says nothing."""


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
    assert set(json.loads(named["x-gradserve"])) == {"id", "deadline", "top_k"}


def test_a_large_image_is_carried_whole() -> None:
    entries, heads = call(answer, image=b"x" * 3_000_000)
    assert entries[0]["class"] == "cat"
    assert b"3000000" in heads[0]


@pytest.mark.parametrize(
    ("serve", "kind"),
    [(None, Unavailable), (hang_up, EngineBroke), (cut_off, EngineBroke), (babble, EngineNonsense)],
)
def test_a_failing_socket_has_its_answer(serve: Serve | None, kind: type[GatewayError]) -> None:
    assert isinstance(call(serve)[0], kind)


def test_a_silent_torchserve_is_left_at_the_deadline() -> None:
    assert isinstance(call(sleep, timeout_s=0.1)[0], DeadlinePassed)
