"""The private wire between gateway and handler: one request is one upstream batch, one answer holds an entry per image.

    POST {inference_url}/predictions/{model}/{version}
    POST {inference_url}/explanations/{model}-explain/{version}

**Request.** `content-type: application/octet-stream`: the body is one image. `content-type:
application/vnd.gradserve.images`: the body is frames, each a 4-byte big-endian length and the bytes of one image, at
most 1024. `x-gradserve`: the `Options` as compact ASCII JSON; keys that a handler does not know are ignored, because an
archive lives longer than the gateway's release that calls it. TorchServe reads each header with four system calls and
drops query strings, so there is no third header.

**Answer.** The status is always 200, because TorchServe closes the connection on every other. `application/json` is
`{"results": [entry, …]}`, one entry per image in order: a prediction `{"class", "confidence", "top": [{"class",
"confidence"}, …]}`, an explanation `{"class", "confidence", "target", "method", "layer", "heatmap"}`, or an error
`{"error": {"code", "detail", …facts}}`; an error of the whole request stands once for each of its images, or once if
they cannot be told apart. `image/png` is the overlay that an explanation asked for; its text `gradserve`, before the
pixels, holds the explanation without its heatmap, and the model. No header carries anything of the
caller's, and no body is longer than TorchServe carries: either kills a worker.

**Wire 2** adds evidence. The option `images` holds one object for each image, `ImageOptions`: an image is predicted or
explained, and both kinds travel in one request to `/predictions`. The entry `-explain` takes the same requests; only it
has the methods that need a backward pass ready from its start. A prediction's entry gains `familiar`. An explanation's
entry is `{"class", "confidence", "target": {"class", "confidence"}, "method", "strength", "heatmap": {"height",
"width", "values"}, "familiar", "familiarity", "similar", "classes", "test"}`; `dump_evidence` describes it. A request
of one explained image with the option `format` `png` is answered by the overlay, as in wire 1. A request with the
option `example` and an empty body is answered by that example's thumbnail as `image/png`, or the error
`unknown_example`.

An archive brings its own handler, so a gateway may call a handler of an earlier release. The schema of the archive's
contract says which wire its handler speaks (`WIRES`).
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

WIRES = {1: 1, 2: 1, 3: 2}
"""The wire that a handler speaks, by the schema of its archive's contract."""

IMAGE_TYPE = "application/octet-stream"
FRAMES_TYPE = "application/vnd.gradserve.images"
OPTIONS_HEADER = "x-gradserve"
JSON_TYPE = "application/json"
PNG_TYPE = "image/png"
PNG_SIGNATURE = b"\x89PNG"

ABOUT_KEYWORD = "gradserve"
"""Of the PNG text that tells what an overlay explains; the gateway makes headers of it."""

FRAME_HEAD_BYTES = 4
"""The length before each image of a framed body."""

MAX_IMAGES = 1024
"""Images in one request; TorchServe's body limit would allow over a million empty ones."""

MAX_REQUEST_BYTES = 6_553_500
"""TorchServe's `max_request_size` in config/torchserve/config.properties; a longer body gets an empty 413."""

MAX_ANSWER_BYTES = 6_500_000
"""Just under TorchServe's default `max_response_size` of 6,553,500 bytes; a longer answer kills the worker."""

MAX_OPTIONS_BYTES = 4000
"""Of the `x-gradserve` header; TorchServe refuses longer headers. A gateway sends smaller upstream batches instead."""

MAX_SIMILAR = 10
"""Training images of one class that an explanation names."""

MAX_OVERLAY_SIDE = 1024
"""Pixels; so an overlay of random noise, which no PNG makes smaller, has 3.2 MB."""

ERROR_CODES = (
    "image_too_large",
    "image_unreadable",
    "unknown_target",
    "unknown_method",
    "unknown_example",
    "bad_options",
    "bad_frames",
    "deadline_passed",
    "handler_failed",
)
"""The codes of error entries; handlers/errors.py raises them and gateway/errors.py gives each its HTTP status."""

Bytes: TypeAlias = bytes | bytearray | memoryview

Entry: TypeAlias = dict[str, Any]
"""One image's entry, in one of the forms of `dump_prediction`, `dump_evidence` and `dump_error`, or of wire 1.

A dictionary, because the gateway passes it on as it is: an object for each image would cost time and change nothing.
"""


class WireError(ValueError):
    """A request or an answer that does not follow the wire."""


class BadFrames(WireError):
    """The body is not what its content type promises; `reason` says how that shows."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body's images cannot be told apart: {reason}")
        self.reason = reason


class BadOptions(WireError):
    """The option `option` is not what is `expected`."""

    def __init__(self, option: str, expected: str) -> None:
        super().__init__(f"{option} must be {expected}")
        self.option = option
        self.expected = expected


class BadAnswer(WireError):
    """The answer is no JSON object with one entry per image; `reason` says how that shows."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the handler's answer cannot be read: {reason}")


class ImageOptions(NamedTuple):
    """Options of one image in wire 2; None means the contract's default.

    `explain` asks for an explanation instead of a prediction, the rest is about it: `target` (a class's index, default
    the top one), `method`, `coverage` (of the answer set; None asks for none), `test` (the hot region kept and
    removed), `similar` (training images of each class to name, 0 to `MAX_SIMILAR`).
    """

    explain: bool = False
    target: int | None = None
    method: str | None = None
    coverage: float | None = None
    test: bool = False
    similar: int = 3


class Options(NamedTuple):
    """Options of a request beside its images; None means the contract's or the image's default.

    `id` is the request's id and `traceparent` its place in a trace, both for logs. `deadline` is Unix time in ms by the
    replica's clock: a request that is reached later is dropped. Predictions: `top_k`. Explanations, of one image:
    `target` (a class, default the top one), `method`, `alpha` (0 to 1, the heatmap's weight in the overlay), `size`
    (pixels of the overlay's long side, default the image's own up to `MAX_OVERLAY_SIDE`), `format` (`png` or `json`).
    Wire 2: `images` (one for each image; none if all are plain predictions; they replace `target` and `method`) and
    `example` (the number of a training image whose thumbnail is asked for).

    A tuple, because the gateway makes two and dumps one for each call: in 4 µs, as frozen dataclasses in 13 of its 150.
    """

    id: str = ""
    deadline: int | None = None
    traceparent: str | None = None
    top_k: int = 1
    target: str | None = None
    method: str | None = None
    alpha: float = 0.5
    size: int | None = None
    format: str = "png"
    images: tuple[ImageOptions, ...] = ()
    example: int | None = None


class Request(NamedTuple):
    """One upstream request as it travels: two headers and the body."""

    content_type: str
    options: str
    body: bytes


DEFAULTS = Options()
PREDICT = ImageOptions()
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def dump_request(images: Sequence[bytes], options: Options) -> Request:
    """Return the request for one or more images, each as its encoded bytes."""
    if len(images) == 1:
        return Request(IMAGE_TYPE, dump_options(options), images[0])
    return Request(FRAMES_TYPE, dump_options(options), join_frames(images))


def parse_body(content_type: str, body: bytes | bytearray) -> list[Bytes]:
    """Return the images of a request; those of frames are views into `body`, without a copy.

    Args:
        content_type: the header, in any case and with any parameters.
        body: the request's body.

    Raises:
        BadFrames: the body is not what the content type promises.
    """
    declared = content_type.split(";", 1)[0].strip().lower()
    return split_frames(body) if declared == FRAMES_TYPE else [body]


def join_frames(images: Sequence[Bytes]) -> bytes:
    """Return the images as one body, each after its length in 4 bytes, big-endian."""
    parts: list[Bytes] = []
    for image in images:
        parts += [len(image).to_bytes(FRAME_HEAD_BYTES, "big"), image]
    return b"".join(parts)


def split_frames(body: bytes | bytearray) -> list[Bytes]:
    """Return the images in a body of frames, as views without a copy.

    Raises:
        BadFrames: there is no frame, there are more than `MAX_IMAGES`, or one is longer than what is left.
    """
    view = memoryview(body)
    images: list[Bytes] = []
    position = 0
    while position < len(view):
        start = position + FRAME_HEAD_BYTES
        if start > len(view):
            raise BadFrames("it ends within a frame's length")
        length = int.from_bytes(view[position:start], "big")
        if length > len(view) - start:
            raise BadFrames(f"a frame of {length} bytes is announced where {len(view) - start} are left")
        if len(images) == MAX_IMAGES:
            raise BadFrames(f"there are more than {MAX_IMAGES} images")
        position = start + length
        images.append(view[start:position])
    if not images:
        raise BadFrames("there is no frame")
    return images


def dump_options(options: Options) -> str:
    """Return the options as compact ASCII JSON, without those that have their default."""
    named = _non_defaults(options, DEFAULTS)
    if options.images:
        named["images"] = [_non_defaults(image, PREDICT) for image in options.images]
    return _ENCODER.encode(named)


def parse_options(header: object) -> Options:
    """Return the options in an `x-gradserve` header; None or an empty text means all defaults.

    Raises:
        BadOptions: it is no JSON object, or a known key has an impossible value.
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
    if "images" in known:
        known["images"] = tuple(map(_parse_image, known["images"]))
    return Options(**known)


def _parse_image(values: dict[str, Any]) -> ImageOptions:
    known = {key: value for key, value in values.items() if key in _IMAGE_CHECKS and value is not None}
    for key, value in known.items():
        is_right, expected = _IMAGE_CHECKS[key]
        if not is_right(value):
            raise BadOptions(key, expected)
    return ImageOptions(**known)


def dump_prediction(top: Sequence[tuple[str, float]], *, familiar: bool | None = None) -> Entry:
    """Return the entry of an image whose best classes with their probabilities are `top`, best first.

    `familiar` (wire 2) says whether the image is like what training saw; None if the archive cannot tell.
    """
    classes = [{"class": name, "confidence": confidence} for name, confidence in top]
    entry: Entry = {**classes[0], "top": classes}
    return entry if familiar is None else {**entry, "familiar": familiar}


def dump_evidence(
    best: tuple[str, float],
    *,
    target: tuple[str, float],
    method: str,
    strength: float | Entry,
    heatmap: Entry,
    **evidence: object,
) -> Entry:
    """Return the entry of an explained image in wire 2.

    Args:
        best: the top class with its probability.
        target: the class that the heatmap is about, with its own probability.
        method: the heatmap's method.
        strength: the heatmap's maximum before scaling, comparable between the classes of one image, or what
            `unavailable` returns.
        heatmap: what `dump_heatmap` returns.
        evidence: `familiar` (bool), `familiarity` (0 to 1), `similar` (a list of `{"id", "class", "similarity"}`),
            `classes` (a list of `{"class", "confidence"}`, if a coverage was asked for), `test` (`{"kept", "removed",
            "verdict"}`, if asked for); each may be what `unavailable` returns.
    """
    name, confidence = best
    return {
        "class": name,
        "confidence": confidence,
        "target": {"class": target[0], "confidence": target[1]},
        "method": method,
        "strength": strength,
        "heatmap": heatmap,
        **evidence,
    }


def dump_heatmap(height: int, width: int, values: bytes) -> Entry:
    """Return a heatmap as it travels; `values` has a byte for each pixel, row by row, 255 for the hottest."""
    return {"height": height, "width": width, "values": base64.b64encode(values).decode("ascii")}


def parse_heatmap(heatmap: object) -> list[bytes]:
    """Return the rows of a heatmap that `dump_heatmap` made, a byte for each pixel.

    Raises:
        BadAnswer: it is none.
    """
    try:
        height, width, values = (heatmap[name] for name in ("height", "width", "values"))  # type: ignore[index]
        pixels = base64.b64decode(values, validate=True)
    except (KeyError, TypeError, IndexError, ValueError, binascii.Error) as error:
        raise BadAnswer("a heatmap has no height, width and values") from error
    if not (_is_integer(height) and _is_integer(width) and height >= 1 and len(pixels) == height * width):
        raise BadAnswer("a heatmap has not as many values as pixels")
    return [pixels[start : start + width] for start in range(0, len(pixels), width)]


def unavailable(reason: str) -> Entry:
    """Return what stands in the place of evidence that cannot be given; `reason` is a sentence for people."""
    return {"unavailable": reason}


def dump_about(explanation: Entry, model: str, version: str) -> str:
    """Return the text `ABOUT_KEYWORD` of an overlay: its explanation's entry without the heatmap, and the model."""
    facts = {name: value for name, value in explanation.items() if name != "heatmap"}
    return dump_json({**facts, "model": {"name": model, "version": version}}).decode("ascii")


def parse_about(overlay: bytes) -> dict[str, Any]:
    """Return the facts that `dump_about` put into an overlay; none of an earlier release's overlay.

    They stand in the PNG's first chunk behind the header: 4 bytes of length, `tEXt`, the keyword, a zero, the text.
    Source: PNG, third edition, sections 5.3, 11.2.1 and 11.3.3.3, https://www.w3.org/TR/png-3/
    """
    text = overlay[41 : 41 + int.from_bytes(overlay[33:37], "big")]
    keyword = ABOUT_KEYWORD.encode() + b"\0"
    if overlay[37:41] != b"tEXt" or not text.startswith(keyword):
        return {}
    try:
        about = json.loads(text.removeprefix(keyword))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def dump_error(code: str, detail: str, facts: Mapping[str, Any]) -> Entry:
    """Return the entry of an image without an answer: `code` is one of `ERROR_CODES`, `facts` are for programs."""
    return {"error": {"code": code, "detail": detail, **facts}}


def parse_error(entry: Entry) -> tuple[str, str, dict[str, Any]]:
    """Return the code, the sentence and the facts of an entry that has an `error`; empty ones where it has none."""
    error = entry.get("error")
    facts = dict(error) if isinstance(error, dict) else {}
    return str(facts.pop("code", "")), str(facts.pop("detail", "")), facts


def dump_results(entries: Sequence[Entry]) -> bytes:
    """Return the answer that holds these entries, as compact ASCII JSON."""
    return dump_json({"results": entries})


def dump_json(data: dict[str, Any]) -> bytes:
    """Return the object as compact ASCII JSON.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return _ENCODER.encode(data).encode("ascii")


def parse_results(content: bytes, count: int, *, loads: Callable[[bytes], Any] = json.loads) -> list[Entry]:
    """Return the `count` entries of an answer.

    Args:
        content: the answer's body.
        count: how many images were asked about.
        loads: the JSON reader, for those who have a faster one than the standard library's; it raises ValueError.

    Raises:
        BadAnswer: the answer is no JSON object with `count` entries.
    """
    try:
        results = loads(content)["results"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise BadAnswer("it is no JSON object with results") from error
    if not isinstance(results, list) or len(results) != count:
        raise BadAnswer(f"it does not hold {count} entries")
    if not all(map(_is_entry, results)):
        raise BadAnswer("an entry is neither an answer nor an error")
    return results


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and ("error" in entry or ("class" in entry and "confidence" in entry))


def _non_defaults(values: Options | ImageOptions, defaults: Options | ImageOptions) -> dict[str, Any]:
    named = zip(values._fields, values, defaults, strict=True)
    return {name: value for name, value, default in named if value != default}


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str) and len(value) <= 200, "a text of at most 200 characters"),
    "deadline": (_is_integer, "a whole number of milliseconds since 1970"),
    "traceparent": (_is_text, "a W3C trace context"),
    "top_k": (lambda value: _is_integer(value) and value >= 1, "a whole number from 1"),
    "target": (_is_text, "a class name"),
    "method": (_is_text, "a method's name"),
    "alpha": (
        lambda value: _is_number(value, 0, 1),
        "a number from 0 to 1",
    ),
    "size": (
        lambda value: _is_integer(value) and 1 <= value <= MAX_OVERLAY_SIDE,
        f"a whole number of pixels from 1 to {MAX_OVERLAY_SIDE}",
    ),
    "format": (lambda value: value in ("png", "json"), "png or json"),
    "images": (
        lambda value: (
            isinstance(value, list) and len(value) <= MAX_IMAGES and all(isinstance(image, dict) for image in value)
        ),
        f"a list of at most {MAX_IMAGES} objects",
    ),
    "example": (lambda value: _is_integer(value) and value >= 0, "a whole number from 0"),
}
_IMAGE_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "explain": (lambda value: isinstance(value, bool), "true or false"),
    "target": (lambda value: _is_integer(value) and value >= 0, "a class's index"),
    "method": _CHECKS["method"],
    "coverage": (lambda value: _is_number(value, 0.5, 0.999), "a number from 0.5 to 0.999"),
    "test": (lambda value: isinstance(value, bool), "true or false"),
    "similar": (lambda value: _is_integer(value) and 0 <= value <= MAX_SIMILAR, f"a number from 0 to {MAX_SIMILAR}"),
}
