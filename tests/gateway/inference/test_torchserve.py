"""The client of TorchServe: every error of the transport, of TorchServe and of the handler is translated."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest

from contracts.wire import Options
from gateway.errors import DeadlinePassed, EngineBroke, EngineNonsense, GatewayError, Unavailable
from gateway.inference.replicas import Replica
from gateway.inference.routing import Target
from gateway.inference.torchserve import Deadline, TorchServe, translate_transport_error
from gateway.inference.transport import PooledTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Stand

ANSWER = b'{"results":[{"class":"cat","confidence":0.9,"top":[]}]}'
IMAGE = b"image-of-dog"
IMAGE_ROUTES = ["/predict", "/explain"]
FILE_ROUTES = [*IMAGE_ROUTES, "/predict/batch"]
INFER = "/v2/models/cifar10/infer"

# TorchServe 0.12's own error answers
TORCHSERVE = [
    (503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}, 503, "saturated"),
    (503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}, 500, "handler_failed"),
    (500, {"code": 500, "type": "InternalServerException", "message": "Worker died."}, 500, "handler_failed"),
    (507, {"code": 507, "type": "InternalServerException", "message": "oom"}, 500, "handler_failed"),
    (404, {"code": 404, "type": "ModelVersionNotFoundException", "message": "secret"}, 503, "not_ready"),
    (400, {"code": 400, "type": "InvalidKeyException", "message": "secret"}, 502, "engine_nonsense"),
    (405, {"code": 405, "type": "MethodNotAllowedException", "message": "secret"}, 502, "engine_nonsense"),
    (413, None, 413, "body_too_large"),
    (200, {"surprise": 1}, 502, "engine_nonsense"),
    (200, {"results": []}, 502, "engine_nonsense"),
    (200, {"results": [{"klass": "cat"}]}, 502, "engine_nonsense"),
    (200, None, 502, "engine_nonsense"),
    (302, None, 502, "engine_nonsense"),
]


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


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
@pytest.mark.parametrize(("status", "body", "public", "code"), TORCHSERVE)
def test_torchserves_own_answers_have_their_status_and_leak_nothing(
    stand: Stand,
    route: str,
    status: int,
    body: dict[str, Any] | None,
    public: int,
    code: str,
    assert_problem: Callable[..., None],
) -> None:
    content = orjson.dumps(body) if body else b""
    stand.torchserve.answer = lambda request: httpx.Response(status, content=content)
    answer = stand.client.post(route, **stand.body(route, IMAGE))
    assert_problem(answer, public, code)
    assert "Exception" not in answer.text
    assert "secret" not in answer.text
    assert public != 503 or "retry-after" in answer.headers


@pytest.mark.parametrize(
    ("code", "status", "public"),
    [
        ("unknown_target", 400, "unknown_target"),
        ("unknown_method", 400, "unknown_method"),
        ("bad_options", 400, "bad_options"),
        ("bad_frames", 400, "bad_frames"),
        ("image_too_large", 413, "image_too_large"),
        ("image_unreadable", 422, "image_unreadable"),
        ("deadline_passed", 504, "deadline_passed"),
        ("handler_failed", 500, "handler_failed"),
        ("never_heard_of", 502, "engine_nonsense"),
    ],
)
@pytest.mark.parametrize("route", [*IMAGE_ROUTES, INFER])
def test_the_handlers_codes_have_their_status(
    stand: Stand, route: str, code: str, status: int, public: str, assert_problem: Callable[..., None]
) -> None:
    answer = stand.client.post(route, **stand.body(route, f"bad:{code}".encode()))
    assert_problem(answer, status, public)
    assert ("the handler's sentence" in answer.text) == (status < 500), "a caller reads only what it can act on"


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_a_passed_deadline_is_504(
    make_stand: Callable[..., Stand], route: str, assert_problem: Callable[..., None]
) -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    stand = make_stand(upstream=never)
    answer = stand.client.post(route, headers={"x-timeout-ms": "50"}, **stand.body(route, IMAGE))
    assert_problem(answer, 504, "deadline_passed")
