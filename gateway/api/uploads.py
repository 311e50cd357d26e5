"""Images out of request bodies: raw or multipart, counted while they stream, cut off when they dawdle.

A file's name and declared size are never looked at; its declared type only to refuse what says itself that it is no
image. What the bytes are, the handler finds out.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.refusals import (
    BadMultipart,
    BodyTooLarge,
    BodyTooSlow,
    EmptyBody,
    FormExpected,
    MediaTypeUnsupported,
    MissingFile,
    TooManyFiles,
    UnexpectedField,
)
from gateway.request_context import context_of
from gateway.state import state_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 1024
# What a multipart body may have beyond its images: boundaries and part headers.
PART_OVERHEAD_BYTES = 2 * 1024
FIELDS = {b"file", b"files", b"image"}
# How clients announce a file, unless its name needs escapes: to parse that takes a third of the form's time.
_PLAIN_FILE = re.compile(rb'form-data; name="?(?:file|files|image)"?(?:; filename="[^"\\;]*")?')
# What curl declares for `--data-binary` unless it is told otherwise; the bytes decide.
ANY_BYTES = {"", "application/octet-stream", "application/x-www-form-urlencoded"}
_SANE_HOST = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,255}")


class ClientGoneError(Exception):
    """The caller closed the connection before the body was whole; nobody is left to answer."""


async def read_image(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The one image in the request's body.

    Raises:
        GatewayError: the body is empty, too large, too slow, of a wrong type, broken multipart, or no single image.
    """
    if is_multipart(request):
        images = await read_images(
            request, max_images=1, max_image_bytes=max_bytes, max_bytes=max_bytes, timeout_s=timeout_s
        )
        return images[0]
    check_media_type(request.headers.get("content-type"), request)
    body = await read_body(request, max_bytes=max_bytes, timeout_s=timeout_s)
    if not body:
        raise EmptyBody
    return body


async def read_images(
    request: Request, *, max_images: int, max_image_bytes: int, max_bytes: int, timeout_s: float
) -> list[bytes]:
    """The images of a multipart body's `file` parts, in order.

    Raises:
        GatewayError: as `read_image`, and for more than `max_images` images.
    """
    form = ImageForm(request, _boundary(request), max_images=max_images, max_image_bytes=max_image_bytes)
    received = 0
    limit = max_bytes + PART_OVERHEAD_BYTES * max_images
    async for chunk in _stream(request, timeout_s):
        received += len(chunk)
        if received > limit:
            raise BodyTooLarge(limit)
        form.write(chunk)
    if received == 0:
        raise EmptyBody
    return form.finish()


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body; its one chunk itself where it came as one.

    Raises:
        BodyTooLarge: it has more than `max_bytes`.
        BodyTooSlow: it was not whole after `timeout_s`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > max_bytes:
        raise BodyTooLarge(max_bytes)
    chunks = []
    received = 0
    async for chunk in _stream(request, timeout_s):
        received += len(chunk)
        if received > max_bytes:
            raise BodyTooLarge(max_bytes)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def is_multipart(request: Request) -> bool:
    """Whether the body announces itself as a form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def check_media_type(declared: str | None, request: Request) -> None:
    """Let pass what may be a raster image: `ANY_BYTES`, and `image/*` but SVG.

    Raises:
        MediaTypeUnsupported: the declared type is something else.
    """
    media_type = (declared or "").split(";", 1)[0].strip().lower()
    if media_type in ANY_BYTES:
        return
    if not media_type.startswith("image/") or media_type.startswith("image/svg"):
        raise MediaTypeUnsupported(media_type, _own_url(request))


def _own_url(request: Request) -> str:
    """Return the request's address without its query, as it can be typed into a shell."""
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host if _SANE_HOST.fullmatch(host) else 'localhost'}{request.scope['path']}"


def _boundary(request: Request) -> bytes:
    media_type, parameters = parse_options_header(request.headers.get("content-type"))
    boundary = parameters.get(b"boundary", b"")
    if media_type != b"multipart/form-data":
        if not media_type:
            raise MissingFile
        raise FormExpected(media_type.decode("latin-1"), _own_url(request))
    if not 1 <= len(boundary) <= 70:
        raise BadMultipart("its boundary is missing or longer than 70 characters")
    return boundary


async def _stream(request: Request, timeout_s: float) -> AsyncIterator[bytes]:
    """The body's chunks as they come, without the empty ones; they count as held until the request is answered."""
    context, budget = context_of(request.scope), state_of(request).body_budget
    end = asyncio.get_running_loop().time() + timeout_s
    more = True
    while more:
        try:
            async with asyncio.timeout_at(end):
                message = await request.receive()
        except TimeoutError:
            raise BodyTooSlow(timeout_s) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        more = message.get("more_body", False)
        if chunk := message.get("body", b""):
            budget.take(len(chunk))
            context.body_bytes += len(chunk)
            yield chunk


class ImageForm:
    """A multipart form of images, parsed as it streams; nothing but parts with a name of `FIELDS` is kept."""

    def __init__(self, request: Request, boundary: bytes, *, max_images: int, max_image_bytes: int) -> None:
        self._request = request
        self._max_images = max_images
        self._max_image_bytes = max_image_bytes
        self._images: list[bytes] = []
        self._chunks: list[bytes] = []
        self._size = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._check_part,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_PART_HEADER_BYTES,
        )

    def write(self, chunk: bytes) -> None:
        """Takes the body's next bytes.

        Raises:
            GatewayError: they break the form, or what it may hold.
        """
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadMultipart("its parts cannot be told apart by its boundary") from error

    def finish(self) -> list[bytes]:
        """The images, when the body is whole.

        Raises:
            GatewayError: the form's end is missing, or it holds no image.
        """
        if not self._is_whole:
            raise BadMultipart("its closing boundary is missing")
        if not self._images:
            raise MissingFile
        return self._images

    def _begin_part(self) -> None:
        self._chunks, self._size, self._headers = [], 0, {}

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _check_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        if not _PLAIN_FILE.fullmatch(disposition):
            name = parse_options_header(disposition)[1].get(b"name", b"")
            if name not in FIELDS:
                raise UnexpectedField(name.decode("utf-8", "replace"))
        if len(self._images) >= self._max_images:
            raise TooManyFiles(self._max_images)
        check_media_type(self._headers.get(b"content-type", b"").decode("latin-1"), self._request)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > self._max_image_bytes:
            raise BodyTooLarge(self._max_image_bytes)
        self._chunks.append(data[start:end])

    def _end_part(self) -> None:
        self._images.append(b"".join(self._chunks))

    def _end(self) -> None:
        self._is_whole = True
