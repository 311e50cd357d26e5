"""The client of TorchServe's inference API, the only module that knows its paths and errors.

contracts/wire.py describes the request and response bodies. TorchServe answers 200 whenever the handler answered.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx
import orjson

from contracts import wire
from contracts.names import EXPLAIN_SUFFIX
from gateway.errors import (
    HANDLER_CODES,
    DeadlinePassed,
    EngineBroke,
    EngineNonsense,
    GatewayError,
    HandlerFailed,
    ImageRefused,
    Unavailable,
)
from gateway.refusals import BodyTooLarge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.wire import Entry, ImageOptions, Options
    from gateway.inference.replicas import Replica
    from gateway.inference.routing import Target

_OPTIONS = wire.OPTIONS_HEADER.encode()

# The error that a caller gets for each transport error; the nearest base class decides, so every error has one. If the
# connection could not be made, TorchServe has not begun the call, so it is sent to another replica.
TRANSPORT_ERRORS: dict[type[BaseException], tuple[type[GatewayError], tuple[Any, ...]]] = {
    httpx.ConnectError: (Unavailable, ("not_ready",)),
    httpx.ConnectTimeout: (Unavailable, ("not_ready",)),
    httpx.PoolTimeout: (Unavailable, ("saturated",)),
    httpx.RemoteProtocolError: (EngineNonsense, ()),
    httpx.TransportError: (EngineBroke, ()),
}


class Deadline:
    """The moment until which the caller waits: `timeout_s` seconds from now, `at` by the event loop's clock."""

    __slots__ = ("at", "timeout_s", "unix_ms")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.unix_ms = int((time.time() + timeout_s) * 1000)
        self.at = asyncio.get_running_loop().time() + timeout_s

    def unix_ms_of(self, replica: Replica) -> int:
        """Return the deadline in Unix milliseconds by the clock of `replica`."""
        return self.unix_ms + int(replica.clock_ahead_s * 1000)

    def left_s(self) -> float:
        """Return the seconds until the deadline; negative after it."""
        return self.at - asyncio.get_running_loop().time()

    def timeout(self) -> asyncio.Timeout:
        """Return a context manager that raises TimeoutError at the deadline."""
        return asyncio.timeout_at(self.at)


class TorchServe:
    """Calls TorchServe's inference API over one pool of connections.

    It calls the transport without httpx's client: that handles redirects, cookies and authentication, which are not
    used here and take as much time as the rest of the call.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def predict(
        self,
        target: Target,
        images: Sequence[bytes],
        *,
        carried: Options,
        deadline: Deadline,
        top_k: int,
        each: tuple[ImageOptions, ...] = (),
    ) -> list[Entry]:
        """Return one entry per image, in order: its answer, or an error for an image that was refused.

        `carried` has the request's id and trace context. `each` has the options of each image if some are explained.

        Raises:
            GatewayError: the upstream batch as a whole failed.
        """
        options = carried._replace(deadline=deadline.unix_ms_of(target.replica), top_k=top_k)
        if each:
            options = options._replace(images=each, format="json")
        content = await self._post(target, wire.dump_request(images, options), deadline)
        return read_results(content, len(images))

    async def ask(
        self, target: Target, image: bytes, *, carried: Options, deadline: Deadline, options: Options
    ) -> bytes | Entry:
        """Return the PNG that `options` ask for, or the image's entry: with `format: json`, or if it was refused.

        The PNG is an overlay, or for an empty image with the option `example` a thumbnail.

        Raises:
            GatewayError: the call failed.
        """
        until = deadline.unix_ms_of(target.replica)
        options = options._replace(id=carried.id, traceparent=carried.traceparent, deadline=until)
        content = await self._post(target, wire.dump_request((image,), options), deadline)
        if content.startswith(wire.PNG_SIGNATURE) and options.format != "json":
            return content
        return read_results(content, 1)[0]

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def _post(self, target: Target, message: wire.Request, deadline: Deadline) -> bytes:
        route, suffix = ("predictions", "") if target.entry == "predict" else ("explanations", EXPLAIN_SUFFIX)
        path = f"/{route}/{target.model}{suffix}/{target.version}"
        if deadline.left_s() <= 0:
            raise DeadlinePassed(deadline.timeout_s)  # `asyncio.timeout_at` in the past would still begin the call
        headers = ((b"content-type", message.content_type.encode()), (_OPTIONS, message.options.encode()))
        request = httpx.Request("POST", parse_url(target.inference_url + path), headers=headers, content=message.body)
        try:
            async with deadline.timeout():
                response = await self._transport.handle_async_request(request)
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise DeadlinePassed(deadline.timeout_s) from error
        except httpx.TransportError as error:
            raise translate_transport_error(error) from error
        if response.status_code != 200:
            raise translate_status(response.status_code, content)
        return content


@lru_cache(maxsize=256)
def parse_url(url: str) -> httpx.URL:
    """Return the parsed URL from a cache: httpx takes 20 µs to parse it, and a gateway calls few URLs."""
    return httpx.URL(url)


def read_results(content: bytes, count: int) -> list[Entry]:
    """Return the entries of an answer for `count` images.

    Raises:
        EngineNonsense: the answer is no JSON list of `count` entries.
    """
    try:
        return wire.parse_results(content, count, loads=orjson.loads)
    except wire.BadAnswer as error:
        raise EngineNonsense from error


def raise_for_error(entry: Entry) -> None:
    """Raise the entry's error, if it has one, as the error that a caller gets.

    Raises:
        GatewayError: the entry has an error.
    """
    if "error" in entry:
        raise translate_entry(entry)


def translate_entry(entry: Entry) -> GatewayError:
    """Return the error that a caller gets for an error entry; only a 4xx has the handler's own sentence."""
    code, detail, facts = wire.parse_error(entry)
    status = HANDLER_CODES.get(code, 502)
    if status < 500:
        return ImageRefused(code, detail, facts)
    if status == 504:
        return DeadlineMissed()
    return HandlerFailed() if status == 500 else EngineNonsense()


class DeadlineMissed(DeadlinePassed):
    """504: the handler dropped the request, because its deadline passed while it waited in TorchServe's queue."""

    def __init__(self) -> None:
        GatewayError.__init__(self, "The request waited in the model's queue until its deadline had passed.")


def translate_transport_error(error: httpx.TransportError) -> GatewayError:
    """Return the error that a caller gets for a transport error."""
    kind, facts = next(TRANSPORT_ERRORS[base] for base in type(error).__mro__ if base in TRANSPORT_ERRORS)
    return kind(*facts)


def translate_status(status: int, content: bytes) -> GatewayError:
    """Return the error that a caller gets for an error response of TorchServe itself."""
    if status == 413:
        return BodyTooLarge(wire.MAX_REQUEST_BYTES)
    if status == 404:
        return Unavailable("not_ready")
    if status == 503 and b"ServiceUnavailableException" in content:
        return Unavailable("saturated")
    if status in {500, 503, 507}:
        return HandlerFailed()
    return EngineNonsense()
