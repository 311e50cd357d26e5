"""The one place that knows TorchServe's inference API: the private wire and its failures.

contracts/wire.py describes what travels. TorchServe answers 200 whenever the handler answered.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx
import orjson

from contracts import wire
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

    from contracts.wire import Entry, Options
    from gateway.inference.replicas import Replica
    from gateway.inference.routing import Target

_OPTIONS = wire.OPTIONS_HEADER.encode()

# What each transport error means for a caller; the nearest class above an error decides, so all are covered. A
# connection that was never made carried nothing: the call may be sent again. One that broke may have been worked on.
TRANSPORT_ERRORS: dict[type[BaseException], tuple[type[GatewayError], tuple[Any, ...]]] = {
    httpx.ConnectError: (Unavailable, ("not_ready",)),
    httpx.ConnectTimeout: (Unavailable, ("not_ready",)),
    httpx.PoolTimeout: (Unavailable, ("saturated",)),
    httpx.RemoteProtocolError: (EngineNonsense, ()),
    httpx.TransportError: (EngineBroke, ()),
}


class Deadline:
    """The moment until which the caller waits: `timeout_s` seconds after its request came, `at` on the loop's clock."""

    __slots__ = ("at", "timeout_s", "unix_ms")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.unix_ms = int((time.time() + timeout_s) * 1000)
        self.at = asyncio.get_running_loop().time() + timeout_s

    def unix_ms_of(self, replica: Replica) -> int:
        """Return the moment in Unix time, in ms, by the clock of `replica`."""
        return self.unix_ms + int(replica.clock_ahead_s * 1000)

    def left_s(self) -> float:
        """Seconds until then."""
        return self.at - asyncio.get_running_loop().time()

    def timeout(self) -> asyncio.Timeout:
        """A context that ends with TimeoutError at the deadline."""
        return asyncio.timeout_at(self.at)


class TorchServe:
    """Calls TorchServe's inference API over one pool of connections.

    The transport is called without httpx's client around it: redirects, cookies and authentication have no place here,
    and their bookkeeping costs as much as the rest of the call.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def predict(
        self, target: Target, images: Sequence[bytes], *, carried: Options, deadline: Deadline, top_k: int
    ) -> list[Entry]:
        """Return one entry per image, in order: a prediction, or an error for an image that was refused.

        `carried` names the request: its id and its place in a trace.

        Raises:
            GatewayError: the row as a whole has no answer.
        """
        path = f"/predictions/{target.model}/{target.version}"
        options = carried._replace(deadline=deadline.unix_ms_of(target.replica), top_k=top_k)
        content = await self._post(target, path, wire.dump_request(images, options), deadline)
        return read_results(content, len(images))

    async def explain(
        self, target: Target, image: bytes, *, carried: Options, deadline: Deadline, options: Options
    ) -> bytes | Entry:
        """Return the overlay's PNG bytes, or with the option `format: json` the explanation's entry.

        Raises:
            GatewayError: there is no explanation; `ImageRefused` when the image or an option is why.
        """
        path = f"/explanations/{target.model}-explain/{target.version}"
        until = deadline.unix_ms_of(target.replica)
        options = options._replace(id=carried.id, traceparent=carried.traceparent, deadline=until)
        content = await self._post(target, path, wire.dump_request((image,), options), deadline)
        if content.startswith(wire.PNG_SIGNATURE) and options.format != "json":
            return content
        entry = read_results(content, 1)[0]
        raise_for_error(entry)
        return entry

    async def close(self) -> None:
        """Closes the pool."""
        await self._transport.aclose()

    async def _post(self, target: Target, path: str, asked: wire.Request, deadline: Deadline) -> bytes:
        if deadline.left_s() <= 0:
            raise DeadlinePassed(deadline.timeout_s)  # a timeout that is over still lets the call begin
        headers = ((b"content-type", asked.content_type.encode()), (_OPTIONS, asked.options.encode()))
        request = httpx.Request("POST", parse_url(target.inference_url + path), headers=headers, content=asked.body)
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
    """The URL, parsed once: httpx takes 20 µs for it, and a gateway calls very few."""
    return httpx.URL(url)


def read_results(content: bytes, count: int) -> list[Entry]:
    """Return the entries of an answer about `count` images.

    Raises:
        EngineNonsense: the answer is no JSON of `count` entries.
    """
    try:
        return wire.parse_results(content, count, loads=orjson.loads)
    except wire.BadAnswer as error:
        raise EngineNonsense from error


def raise_for_error(entry: Entry) -> None:
    """Return if the entry is an answer.

    Raises:
        GatewayError: what the entry's error is to a caller.
    """
    if "error" in entry:
        raise translate_entry(entry)


def translate_entry(entry: Entry) -> GatewayError:
    """Return an error entry as a caller gets it: the handler's own sentence only where the caller can act."""
    code, detail, facts = wire.parse_error(entry)
    status = HANDLER_CODES.get(code, 502)
    if status < 500:
        return ImageRefused(code, detail, facts)
    if status == 504:
        return DeadlineMissed()
    return HandlerFailed() if status == 500 else EngineNonsense()


class DeadlineMissed(DeadlinePassed):
    """504: the handler dropped the row, because its deadline had passed in the queue."""

    def __init__(self) -> None:
        GatewayError.__init__(self, "The request waited in the model's queue until its deadline had passed.")


def translate_transport_error(error: httpx.TransportError) -> GatewayError:
    """What a failed exchange with TorchServe is to a caller."""
    kind, facts = next(TRANSPORT_ERRORS[base] for base in type(error).__mro__ if base in TRANSPORT_ERRORS)
    return kind(*facts)


def translate_status(status: int, content: bytes) -> GatewayError:
    """What TorchServe's own error answer is to a caller."""
    if status == 413:
        return BodyTooLarge(wire.MAX_REQUEST_BYTES)
    if status == 404:
        return Unavailable("not_ready")
    if status == 503 and b"ServiceUnavailableException" in content:
        return Unavailable("saturated")
    if status in {500, 503, 507}:
        return HandlerFailed()
    return EngineNonsense()
