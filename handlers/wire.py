"""One row of a TorchServe batch: read its headers and body by contracts/wire.py, and keep what is wrong with it.

Knows TorchServe's context and the wire, and nothing of images or networks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from contracts import wire
from handlers.errors import BadFrames, BadOptions, DeadlinePassed, RequestError

if TYPE_CHECKING:
    from contracts.wire import Bytes, Options

_BODY = "body"


class RowContext(Protocol):
    """The part of TorchServe's `ts.context.Context` that the handler uses for a batch."""

    metrics: Any
    """TorchServe's own metrics, None outside a worker."""

    def get_request_header(self, idx: int, key: str) -> Any:  # noqa: ANN401 - str for headers, dict for body parts
        """Return the header `key` of row `idx`, or None."""

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Set the content type of the answer to row `idx`."""


@dataclass
class Row:
    """One row: what is asked about which images, or why it cannot be answered."""

    kind: str
    """`predict`, `explain` (each image may ask for the other), `describe` or `example`."""
    options: Options = field(default_factory=wire.Options)
    images: list[Bytes] = field(default_factory=list)
    error: RequestError | None = None

    def check_deadline(self) -> None:
        """Return if somebody still waits for the answer.

        Raises:
            DeadlinePassed: the deadline is over.
        """
        if self.options.deadline is not None:
            late_ms = int(time.time() * 1000) - self.options.deadline
            if late_ms > 0:
                raise DeadlinePassed(late_ms)


@dataclass(frozen=True)
class Answer:
    """One row's answer; `body` is at most `contracts.wire.MAX_ANSWER_BYTES` long."""

    body: bytes
    content_type: str


def read_row(part: dict[str, Any], context: RowContext, index: int) -> Row:
    """Return the row `index` of a batch; whatever is wrong with it is in its `error`, nothing is raised."""
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
        row.images = wire.parse_body(_content_type(context, index), body)
        row.options = wire.parse_options(context.get_request_header(index, wire.OPTIONS_HEADER))
        _check_kind(row)
        row.check_deadline()
    except wire.BadFrames as error:
        row.error = BadFrames(error.reason)
    except wire.BadOptions as error:
        row.error = BadOptions(error.option, error.expected)
    except RequestError as error:
        row.error = error
    return row


def _check_kind(row: Row) -> None:
    """Make the row one that asks for an example, if it does, and compare its images with its options.

    Raises:
        BadOptions: it has options for more or fewer images than it has.
        BadFrames: it has several images where one is explained.
    """
    if row.options.example is not None:
        row.kind, row.images = "example", []
    elif row.options.images and len(row.options.images) != len(row.images):
        raise BadOptions("images", f"one object for each of the {len(row.images)} images")
    elif row.kind == "explain" and not row.options.images and len(row.images) != 1:
        raise BadFrames("an explanation takes exactly one image")


def _content_type(context: RowContext, index: int) -> str:
    # TorchServe keeps the content type beside the body's part; the request's header has whatever case the client wrote.
    part = context.get_request_header(index, _BODY)
    declared = part.get("content-type") if isinstance(part, dict) else context.get_request_header(index, "content-type")
    return str(declared or "")
