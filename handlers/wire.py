"""One row of a TorchServe batch: how its headers and body are read, how its answer is written.

handlers/image_handler.py describes the wire as a whole; this file knows its parts and nothing of images or networks.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from handlers.errors import BadFrames, BadOptions, DeadlinePassed, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

FRAMES_TYPE = "application/vnd.gradserve.images"
OPTIONS_HEADER = "x-gradserve"
JSON_TYPE = "application/json"
PNG_TYPE = "image/png"

MAX_IMAGES = 1024
"""Images in one row; TorchServe's body limit of 6.5 MB would allow over a million empty ones."""

MAX_ANSWER_BYTES = 6_500_000
"""Just under TorchServe's default `max_response_size` of 6,553,500 bytes; a longer answer kills the worker."""

MAX_OVERLAY_SIDE = 1024
"""Pixels; so an overlay of random noise, which no PNG makes smaller, has 3.2 MB."""

_BODY = "body"

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

Bytes = bytes | bytearray | memoryview


class RowContext(Protocol):
    """What is used of TorchServe's `ts.context.Context` while a batch is answered."""

    metrics: Any
    """TorchServe's own metrics, None outside a worker."""

    def get_request_header(self, idx: int, key: str) -> Any:  # noqa: ANN401 - str for headers, dict for body parts
        """The header `key` of row `idx`, or None."""

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Sets the content type of the answer to row `idx`."""


@dataclass(frozen=True)
class Options:
    """What the `x-gradserve` header asks for; unset values take the contract's or the image's default."""

    id: str = ""
    deadline: int | None = None
    top_k: int = 1
    target: str | None = None
    method: str | None = None
    alpha: float = 0.5
    size: int | None = None
    format: str = "png"


@dataclass
class Row:
    """One row: what is asked about which images, or why it cannot be answered."""

    kind: str
    """`predict`, `explain` or `describe`."""
    options: Options = field(default_factory=Options)
    images: list[Bytes] = field(default_factory=list)
    error: RequestError | None = None

    def check_deadline(self) -> None:
        """Does nothing while somebody waits for the answer.

        Raises:
            DeadlinePassed: the deadline is over.
        """
        if self.options.deadline is not None:
            late_ms = int(time.time() * 1000) - self.options.deadline
            if late_ms > 0:
                raise DeadlinePassed(late_ms)


@dataclass(frozen=True)
class Answer:
    """One row's answer; `body` never exceeds `MAX_ANSWER_BYTES`."""

    body: bytes
    content_type: str


def read_row(part: dict[str, Any], context: RowContext, index: int) -> Row:
    """The row `index` of a batch; whatever is wrong with it is in its `error`, nothing is raised."""
    # TorchServe itself sets `explain`, last, to "True" or "False"; only this exact spelling is safe from a caller's own
    # header.
    kind = "predict"
    if context.get_request_header(index, "describe") == "True":
        return Row("describe")
    if context.get_request_header(index, "explain") == "True":
        kind = "explain"
    row = Row(kind)
    body = part.get(_BODY) or b""
    if isinstance(body, str):  # TorchServe decodes text/* unless it is told not to
        body = body.encode("utf-8", "replace")
    try:
        if not isinstance(body, bytes | bytearray):
            raise BadFrames("it is no sequence of bytes")
        row.images = split_frames(body) if _content_type(context, index) == FRAMES_TYPE else [body]
        row.options = parse_options(context.get_request_header(index, OPTIONS_HEADER))
        if kind == "explain" and len(row.images) != 1:
            raise BadFrames("an explanation takes exactly one image")
        row.check_deadline()
    except RequestError as error:
        row.error = error
    return row


def split_frames(body: bytes | bytearray) -> list[Bytes]:
    """The images in a body of frames (4-byte big-endian length and bytes each), as views without a copy.

    Raises:
        BadFrames: no frame, too many, or a frame longer than what is left.
    """
    view = memoryview(body)
    images: list[Bytes] = []
    position = 0
    while position < len(view):
        if len(view) - position < 4:
            raise BadFrames("it ends within a frame's length")
        (length,) = struct.unpack_from("!I", view, position)
        position += 4
        if length > len(view) - position:
            raise BadFrames(f"a frame of {length} bytes is announced where {len(view) - position} are left")
        if len(images) == MAX_IMAGES:
            raise BadFrames(f"there are more than {MAX_IMAGES} images")
        images.append(view[position : position + length])
        position += length
    if not images:
        raise BadFrames("there is no frame")
    return images


def join_frames(images: list[bytes]) -> bytes:
    """The body that `split_frames` takes apart."""
    return b"".join(struct.pack("!I", len(image)) + image for image in images)


def parse_options(header: object) -> Options:
    """The options in an `x-gradserve` header; None or empty means all defaults.

    Keys that are not known are ignored: an archive lives longer than the gateway's release that calls it.

    Raises:
        BadOptions: no JSON object, or a known key with an impossible value.
    """
    if not header:
        return Options()
    try:
        values = json.loads(str(header))
    except (ValueError, RecursionError) as error:
        raise BadOptions(OPTIONS_HEADER, "a JSON object") from error
    if not isinstance(values, dict):
        raise BadOptions(OPTIONS_HEADER, "a JSON object")
    known = {key: value for key, value in values.items() if key in _CHECKS and value is not None}
    for key, value in known.items():
        is_right, expected = _CHECKS[key]
        if not is_right(value):
            raise BadOptions(key, expected)
    return Options(**known)


def write_results(entries: list[dict[str, Any]]) -> bytes:
    """`{"results": entries}` as compact ASCII JSON."""
    return write_json({"results": entries})


def write_json(data: dict[str, Any]) -> bytes:
    """Compact ASCII JSON."""
    return _ENCODER.encode(data).encode("ascii")


def _content_type(context: RowContext, index: int) -> str:
    # TorchServe keeps the content type beside the body's part; the request's header has whatever case the client wrote.
    part = context.get_request_header(index, _BODY)
    declared = part.get("content-type") if isinstance(part, dict) else context.get_request_header(index, "content-type")
    return str(declared or "").split(";", 1)[0].strip().lower()


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str) and len(value) <= 200, "a text of at most 200 characters"),
    "deadline": (_is_integer, "a whole number of milliseconds since 1970"),
    "top_k": (lambda value: _is_integer(value) and value >= 1, "a whole number from 1"),
    "target": (_is_text, "a class name"),
    "method": (_is_text, "a method's name"),
    "alpha": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
        "a number from 0 to 1",
    ),
    "size": (
        lambda value: _is_integer(value) and 1 <= value <= MAX_OVERLAY_SIDE,
        f"a whole number of pixels from 1 to {MAX_OVERLAY_SIDE}",
    ),
    "format": (lambda value: value in ("png", "json"), "png or json"),
}
