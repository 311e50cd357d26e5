"""The gateway's calls, each as a request and the reader of its answer; `Client` and `AsyncClient` only send them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from gradserve.answers import Evidence, Failed, Prediction, Similar, parse_batch, parse_evidence, parse_prediction
from gradserve.errors import AnswerUnreadable, GatewayProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import httpx

    from gradserve.answers import Document

T = TypeVar("T")
ImageSource: TypeAlias = bytes | str | os.PathLike[str]
"""An image file: its bytes or its path."""

BATCH_IMAGES = 32
BATCH_BYTES = 8 * 1024 * 1024
"""Limits of one call of a batch, below the gateway's `GATEWAY_MAX_BATCH_IMAGES` (256) and `GATEWAY_MAX_BATCH_BYTES`
(32 MiB)."""

_RAW = {"content-type": "application/octet-stream"}
_JSON = {"accept": "application/json"}


@dataclass(frozen=True)
class Call(Generic[T]):
    """One HTTP request, as arguments of `httpx.Client.request`, and the reader of its answer.

    With `takes_errors`, an answer with the status of an error is read like any other.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] = field(default_factory=dict)
    takes_errors: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx's `request`."""
        return {"method": self.method, "url": self.path, **self.body}

    def result(self, answer: httpx.Response) -> T:
        """Return what the answer says.

        Raises:
            GatewayProblem: it is an error.
            AnswerUnreadable: it is not the expected document.
        """
        if not answer.is_success and not self.takes_errors:
            raise _problem(answer)
        try:
            return self.read(answer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise AnswerUnreadable(answer.status_code, f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class RetryPolicy:
    """Send a refused call again, at most `retries` times, if no work on it has begun.

    These calls are refused with 503 and Retry-After, or with 429. If Retry-After is above `longest_pause_s`, as for a
    daily quota, the call is not sent again.
    """

    retries: int
    longest_pause_s: float

    def pause_s(self, answer: httpx.Response, attempt: int) -> float | None:
        """Return the seconds to wait before the call is sent again; None to take the answer.

        Args:
            answer: the answer of the attempt.
            attempt: the number of attempts before this one.
        """
        asked = answer.headers.get("retry-after", "")
        is_safe = answer.status_code == 429 or (answer.status_code == 503 and asked.isdigit())
        least_s = float(asked) if asked.isdigit() else 0.5 * 2.0**attempt
        if not is_safe or attempt >= self.retries or least_s > self.longest_pause_s:
            return None
        # Random, so that callers that were refused together do not all come back together.
        return least_s * random.uniform(1.0, 1.5)  # noqa: S311 - no secret


def read_image(image: ImageSource) -> bytes:
    """Return the bytes of an image file.

    Raises:
        OSError: the file cannot be read.
    """
    return bytes(image) if isinstance(image, bytes | bytearray | memoryview) else Path(image).read_bytes()


def split(images: Iterable[ImageSource]) -> Iterator[list[bytes]]:
    """Yield the bytes of the images in their order, in groups that fit into one call.

    Raises:
        OSError: a file cannot be read.
    """
    group: list[bytes] = []
    for image in map(read_image, images):
        if group and (len(group) == BATCH_IMAGES or sum(map(len, group)) + len(image) > BATCH_BYTES):
            yield group
            group = []
        group.append(image)
    if group:
        yield group


def predict(image: bytes, **options: object) -> Call[Prediction]:
    """Return the call that names the class of one image."""
    body = {"params": _given(options), "content": image, "headers": _RAW}
    return Call("POST", "/predict", lambda answer: parse_prediction(answer.json()), body)


def predict_batch(images: Sequence[bytes], **options: object) -> Call[list[Prediction | Failed]]:
    """Return the call that names the class of each image."""
    return _batch("/predict/batch", images, options, parse_prediction)


def explain(image: bytes, **options: object) -> Call[bytes]:
    """Return the call for the heatmap over one image."""
    body = {"params": _given(options), "content": image, "headers": {**_RAW, "accept": "image/png"}}
    return Call("POST", "/explain", _png, body)


def evidence(image: bytes, *, heatmap: bool, **options: object) -> Call[Evidence]:
    """Return the call for the evidence about one image."""
    params = _given({**options, "heatmap": _heatmap_form(heatmap=heatmap)})
    body = {"params": params, "content": image, "headers": {**_RAW, **_JSON}}
    return Call("POST", "/explain", lambda answer: parse_evidence(answer.json()), body)


def explain_batch(images: Sequence[bytes], *, heatmap: bool, **options: object) -> Call[list[Evidence | Failed]]:
    """Return the call for the evidence about each image."""
    options = {**options, "heatmap": _heatmap_form(heatmap=heatmap)}
    return _batch("/explain/batch", images, options, parse_evidence)


def example(similar: Similar) -> Call[bytes]:
    """Return the call for the thumbnail of a training image.

    Raises:
        ValueError: the version has no thumbnails.
    """
    if not similar.url:
        raise ValueError("the version has no thumbnails: pack it again with gradserve package")
    return Call("GET", similar.url, _png)


def feedback(request_id: str, class_name: str, note: str | None) -> Call[None]:
    """Return the call that reports the right class of an earlier call's image."""
    document = {"request_id": request_id, "class": class_name, **_given({"note": note})}
    return Call("POST", "/feedback", lambda _: None, {"json": document})


def models() -> Call[Document]:
    """Return the call for the versions and their contracts."""
    return Call("GET", "/models", _object)


def health() -> Call[Document]:
    """Return the call for the health report, which comes with 503 if nothing serves."""
    return Call("GET", "/health", _object, takes_errors=True)


def _batch(
    path: str, images: Sequence[bytes], options: dict[str, object], parse: Callable[[Document], T]
) -> Call[list[T | Failed]]:
    files = [("file", ("image", image, "application/octet-stream")) for image in images]
    read = partial(_entries, parse=parse, count=len(images))
    return Call("POST", path, read, {"params": _given(options), "files": files, "headers": _JSON})


def _entries(answer: httpx.Response, parse: Callable[[Document], T], count: int) -> list[T | Failed]:
    return parse_batch(answer.json(), parse, count)


def _object(answer: httpx.Response) -> Document:
    document = answer.json()
    if not isinstance(document, dict):
        raise TypeError("no JSON object")
    return document


def _png(answer: httpx.Response) -> bytes:
    if not answer.content.startswith(b"\x89PNG"):
        raise ValueError("no PNG image")
    return answer.content


def _heatmap_form(*, heatmap: bool) -> str:
    return "base64" if heatmap else "none"


def _given(options: dict[str, object]) -> dict[str, object]:
    """Return the options that were given: neither None nor False, which are the gateway's defaults."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def _problem(answer: httpx.Response) -> GatewayProblem:
    try:
        problem = answer.json()
    except ValueError:  # a proxy's page
        problem = {}
    return GatewayProblem(answer.status_code, problem if isinstance(problem, dict) else {})
