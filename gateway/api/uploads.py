"""Read images from request bodies, raw or multipart, with limits on bytes and time while they arrive.

A file's declared size is ignored, and its name too, except in errors. Its declared type is used only to refuse a file
that is declared as something other than an image. The handler decides by the bytes.
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
    FileTypeUnsupported,
    FormExpected,
    MediaTypeUnsupported,
    MissingFile,
    TooManyFiles,
    UnexpectedField,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 1024
# Bytes for each image that a multipart body may have for boundaries and part headers.
PART_OVERHEAD_BYTES = 2 * 1024
FIELDS = {b"file", b"files", b"image"}
# The usual Content-Disposition of a file. Parsing it by the library takes a third of the time for the whole form.
_PLAIN_FILE = re.compile(rb'form-data; name="?(?:file|files|image)"?(?:; filename="[^"\\;]*")?')
# Content types that say nothing about the bytes; curl sends the last one by default for `--data-binary`.
ANY_BYTES = {"", "application/octet-stream", "application/x-www-form-urlencoded"}
_SANE_HOST = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,255}")


class ClientGoneError(Exception):
    """The caller closed the connection before the body was complete, so there is nobody to answer."""


async def read_image(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the one image in the request's body.

    Raises:
        GatewayError: the body is empty, too large, too slow, of a wrong type or broken, or has not exactly one image.
    """
    if is_multipart(request):
        images = await read_images(
            request, max_images=1, max_image_bytes=max_bytes, max_bytes=max_bytes, timeout_s=timeout_s
        )
        return images[0]
    media_type = media_type_of(request.headers.get("content-type", ""))
    if not may_be_image(media_type):
        raise MediaTypeUnsupported(media_type, _own_url(request))
    body = await read_body(request, max_bytes=max_bytes, timeout_s=timeout_s)
    if not body:
        raise EmptyBody
    return body


async def read_images(
    request: Request, *, max_images: int, max_image_bytes: int, max_bytes: int, timeout_s: float
) -> list[bytes]:
    """Return the images in the `file` fields of a multipart body, in order.

    Raises:
        GatewayError: as `read_image`, or the body has more than `max_images` images.
    """
    form = ImageForm(_boundary(request), max_images=max_images, max_image_bytes=max_image_bytes)
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
    """Return the whole body; a body that came as one chunk is not copied.

    Raises:
        BodyTooLarge: the body has more than `max_bytes` bytes.
        BodyTooSlow: the body was not complete after `timeout_s` seconds.
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
    """Return True if the body is declared as multipart."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def media_type_of(declared: str) -> str:
    """Return the media type in a Content-Type header, without its parameters."""
    return declared.split(";", 1)[0].strip().lower()


def may_be_image(media_type: str) -> bool:
    """Return True for the types in `ANY_BYTES`, and for `image/*` except SVG."""
    return media_type in ANY_BYTES or (media_type.startswith("image/") and not media_type.startswith("image/svg"))


def _own_url(request: Request) -> str:
    """Return the request's URL without its query, in characters that are safe in a shell command."""
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
    """Yield the body's chunks that are not empty."""
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
            yield chunk


class ImageForm:
    """A parser for a multipart form of images, fed while the body arrives; it takes only the fields `FIELDS`."""

    def __init__(self, boundary: bytes, *, max_images: int, max_image_bytes: int) -> None:
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
        """Parse the body's next bytes.

        Raises:
            GatewayError: the form is broken or over a limit, or has an unknown field.
        """
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadMultipart("its boundary does not separate its parts") from error

    def finish(self) -> list[bytes]:
        """Return the images of the complete form.

        Raises:
            GatewayError: the form's end is missing, or it has no image.
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
        media_type = media_type_of(self._headers.get(b"content-type", b"").decode("latin-1"))
        if not may_be_image(media_type):
            file_name = parse_options_header(disposition)[1].get(b"filename", b"").decode("utf-8", "replace")
            raise FileTypeUnsupported(len(self._images), file_name, media_type)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > self._max_image_bytes:
            raise BodyTooLarge(self._max_image_bytes)
        self._chunks.append(data[start:end])

    def _end_part(self) -> None:
        self._images.append(b"".join(self._chunks))

    def _end(self) -> None:
        self._is_whole = True
