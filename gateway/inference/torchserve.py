"""The one place that knows TorchServe's inference API: the private wire and its failures.

    POST {inference_url}/predictions/{model}/{version}
    POST {inference_url}/explanations/{model}-explain/{version}

`content-type` says what the body is: `application/octet-stream`, one image's bytes; `application/vnd.gradserve.images`,
frames of a 4-byte big-endian length and the image's bytes. `x-gradserve` is compact ASCII JSON with everything else:
`id`, `deadline` (Unix time in ms by the replica's clock), `traceparent` where there is one, and the options. TorchServe
reads a header with four system calls and drops query strings, so there is no third header. It answers 200 whenever the
handler answered: `{"results": [entry, …]}`, one entry per image, an error inside an entry; or the overlay's PNG bytes.
"""

from __future__ import annotations

import asyncio
import json
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx
import orjson

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

    from gateway.inference.replicas import Replica
    from gateway.inference.routing import Target

IMAGE_TYPE = b"application/octet-stream"
FRAMES_TYPE = b"application/vnd.gradserve.images"
# TorchServe's `max_request_size` in config/torchserve/config.properties; a longer row gets an empty 413.
MAX_ROW_BYTES = 6_553_500
PNG_SIGNATURE = b"\x89PNG"

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
        self, target: Target, images: Sequence[bytes], *, carried: dict[str, str], deadline: Deadline, top_k: int
    ) -> list[dict[str, Any]]:
        """One entry per image, in order: a prediction, or `{"error": {...}}` for an image that was refused.

        Raises:
            GatewayError: the row as a whole has no answer.
        """
        path = f"/predictions/{target.model}/{target.version}"
        headers = row_headers(len(images), {**carried, "deadline": deadline.unix_ms_of(target.replica), "top_k": top_k})
        body = images[0] if len(images) == 1 else join_frames(images)
        content = await self._post(target, path, headers, body, deadline)
        return read_results(content, len(images))

    async def explain(
        self, target: Target, image: bytes, *, carried: dict[str, str], deadline: Deadline, options: dict[str, Any]
    ) -> bytes | dict[str, Any]:
        """The overlay's PNG bytes, or with the option `format: json` the explanation's entry.

        Raises:
            GatewayError: there is no explanation; `ImageRefused` when the image or an option is why.
        """
        path = f"/explanations/{target.model}-explain/{target.version}"
        headers = row_headers(1, {**carried, "deadline": deadline.unix_ms_of(target.replica), **options})
        content = await self._post(target, path, headers, image, deadline)
        if content.startswith(PNG_SIGNATURE) and options.get("format") != "json":
            return content
        entry = read_results(content, 1)[0]
        raise_for_error(entry)
        return entry

    async def close(self) -> None:
        """Closes the pool."""
        await self._transport.aclose()

    async def _post(
        self, target: Target, path: str, headers: list[tuple[bytes, bytes]], body: bytes, deadline: Deadline
    ) -> bytes:
        if deadline.left_s() <= 0:
            raise DeadlinePassed(deadline.timeout_s)  # a timeout that is over still lets the call begin
        request = httpx.Request("POST", parse_url(target.inference_url + path), headers=headers, content=body)
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


def row_headers(count: int, options: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """The two headers of a row of `count` images."""
    packed = orjson.dumps(options)
    if not packed.isascii():  # as a class's name may be; orjson, ten times as fast, escapes nothing
        packed = json.dumps(options, separators=(",", ":")).encode("ascii")
    return [(b"content-type", IMAGE_TYPE if count == 1 else FRAMES_TYPE), (b"x-gradserve", packed)]


def join_frames(images: Sequence[bytes]) -> bytes:
    """The images as one body: before each, its length as 4 bytes, big-endian."""
    parts = []
    for image in images:
        parts += [len(image).to_bytes(4, "big"), image]
    return b"".join(parts)


def read_results(content: bytes, count: int) -> list[dict[str, Any]]:
    """The entries of a row's answer.

    Raises:
        EngineNonsense: the answer is no JSON of `count` entries.
    """
    try:
        results = orjson.loads(content)["results"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineNonsense from error
    if not isinstance(results, list) or len(results) != count or not all(_is_entry(entry) for entry in results):
        raise EngineNonsense
    return results


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and ("error" in entry or ("class" in entry and "confidence" in entry))


def raise_for_error(entry: dict[str, Any]) -> None:
    """Does nothing for an answer.

    Raises:
        GatewayError: what the entry's error is to a caller.
    """
    if "error" in entry:
        raise translate_entry(entry["error"])


def translate_entry(error: object) -> GatewayError:
    """The handler's error for one image or row, as a caller gets it: its own sentence only where the caller can act."""
    facts = dict(error) if isinstance(error, dict) else {}
    code, detail = str(facts.pop("code", "")), str(facts.pop("detail", ""))
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
        return BodyTooLarge(MAX_ROW_BYTES)
    if status == 404:
        return Unavailable("not_ready")
    if status == 503 and b"ServiceUnavailableException" in content:
        return Unavailable("saturated")
    if status in {500, 503, 507}:
        return HandlerFailed()
    return EngineNonsense()
