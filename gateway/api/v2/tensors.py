"""Convert V2 tensors to images, and predictions to V2 tensors, in JSON or with the binary tensor extension.

A binary BYTES tensor is a sequence of elements, each preceded by its length as 4 bytes, little-endian. In JSON an
element is base64.
Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from gateway.api.params import LEAST_COVERAGE, MAX_TOP_K, MOST_COVERAGE
from gateway.errors import GatewayError
from gateway.inference.questions import Question
from gateway.refusals import BadJson, BadParameter, BodyTooLarge, EmptyBody, TooManyFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUTS = {"class": "BYTES", "confidence": "FP32", "familiar": "BOOL", "familiarity": "FP32", "classes": "BYTES"}
DEFAULT_OUTPUTS = ("class", "confidence")
EXPLAINED_OUTPUTS = {"familiarity", "classes"}  # in the entries of explanations only
DEFAULT_COVERAGE = 0.95
MAX_MEMBERS, MEMBERS_PER_IMAGE = 1000, 4  # of the JSON part
MAX_DIMENSIONS = 8  # of a shape: multiplying the millions that a body has room for would take hours


@dataclass(frozen=True)
class InferRequest:
    """A parsed V2 call. Each of `outputs` is the name of a wanted output, and True if it is sent in binary."""

    id: str
    images: list[bytes]
    top_k: int
    coverage: float
    outputs: tuple[tuple[str, bool], ...]

    def question(self) -> Question | None:
        """Return the question about each image; None if a prediction has all outputs."""
        names = {name for name, _ in self.outputs}
        if not names & EXPLAINED_OUTPUTS:
            return None
        return Question(coverage=self.coverage if "classes" in names else None)


class ImageFailedError(GatewayError):
    """The error of the image `index`, which fails the whole V2 call."""

    def __init__(self, index: int, error: dict[str, Any]) -> None:
        headers = {"retry-after": "1"} if error["status"] == 503 else None
        super().__init__(f"Image {index}: {error['detail']}", headers=headers, index=index)
        self.status = error["status"]
        self.code = error["code"]


def read_request(body: bytes, header_length: str | None, *, max_images: int, max_image_bytes: int) -> InferRequest:
    """Parse a V2 call's body; `header_length` is the value of its header Inference-Header-Content-Length.

    Raises:
        GatewayError: the body is no V2 call, or has more or larger images than allowed.
    """
    if not body:
        raise EmptyBody
    end = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
            raise BadParameter("inference-header-content-length", header_length, "a number of bytes")
        end = min(int(header_length), end)
    # A parsed member takes 24 times its bytes in memory. Base64 has none of these characters.
    if sum(body.count(sign, 0, end) for sign in (b"[", b"{", b",")) > MAX_MEMBERS + MEMBERS_PER_IMAGE * max_images:
        raise BadJson("it has more members than a call can have")
    try:
        head = orjson.loads(memoryview(body)[:end])
    except orjson.JSONDecodeError as error:
        raise BadJson("it cannot be parsed") from error
    if not isinstance(head, dict):
        raise BadJson("it is no object")
    images = _images(_input(head), memoryview(body)[end:], max_images)
    if any(len(image) > max_image_bytes for image in images):
        raise BodyTooLarge(max_image_bytes)
    parameters = _object(head.get("parameters"), "parameters")
    identity = head.get("id", "")
    if not isinstance(identity, str):
        raise BadJson("`id` is no text")
    outputs = _outputs(head, parameters)
    top_k = _top_k(parameters, {name for name, _ in outputs})
    return InferRequest(identity, images, top_k, _coverage(parameters), outputs)


def _top_k(parameters: dict[str, Any], outputs: set[str]) -> int:
    top_k = parameters.get("top_k", 1)
    if not isinstance(top_k, int) or not _is_number(top_k, 1, MAX_TOP_K):
        raise BadParameter("top_k", str(top_k), f"a whole number from 1 to {MAX_TOP_K}")
    if top_k > 1 and outputs & EXPLAINED_OUTPUTS:
        raise BadParameter("top_k", str(top_k), "1, which the outputs familiarity and classes need")
    return top_k


def _coverage(parameters: dict[str, Any]) -> float:
    coverage: Any = parameters.get("coverage", DEFAULT_COVERAGE)
    if not _is_number(coverage, LEAST_COVERAGE, MOST_COVERAGE):
        raise BadParameter("coverage", str(coverage), f"a number from {LEAST_COVERAGE} to {MOST_COVERAGE}")
    return float(coverage)


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def raise_for_failed(entries: Sequence[dict[str, Any]]) -> None:
    """Raise the error of the first image that has no prediction.

    Raises:
        ImageFailedError: an image has no prediction.
    """
    for index, entry in enumerate(entries):
        if "error" in entry:
            raise ImageFailedError(index, entry["error"])


def write_response(
    head: dict[str, Any], entries: Sequence[dict[str, Any]], infer_request: InferRequest
) -> tuple[bytes, int | None]:
    """Return the body, and the length of its JSON part if binary tensors follow it, else None.

    Raises:
        BadParameter: the version that answered cannot give an output.
    """
    wide = infer_request.top_k > 1
    columns = min((len(entry["top"]) for entry in entries), default=0) if wide else 1
    outputs, blobs = [], []
    for name, is_binary in infer_request.outputs:
        shape = [len(entries)]
        if wide and name in DEFAULT_OUTPUTS:
            shape.append(columns)
            values = [best[name] for entry in entries for best in entry["top"][:columns]]
        else:
            values = [_value(name, entry) for entry in entries]
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": shape}
        if is_binary:
            blob = _pack(name, values)
            blobs.append(blob)
            output["parameters"] = {"binary_data_size": len(blob)}
        else:
            output["data"] = values
        outputs.append(output)
    content = orjson.dumps({**head, "outputs": outputs})
    return (content + b"".join(blobs), len(content)) if blobs else (content, None)


def _value(name: str, entry: dict[str, Any]) -> Any:  # noqa: ANN401 - a text, a number or a flag
    value = entry.get(name)
    if value is None or isinstance(value, dict):
        raise BadParameter("outputs", name, "given by this version: GET /models says what its archive holds")
    return orjson.dumps([member["class"] for member in value]).decode() if name == "classes" else value


def _pack(name: str, values: list[Any]) -> bytes:
    if OUTPUTS[name] == "FP32":
        return struct.pack(f"<{len(values)}f", *values)
    if OUTPUTS[name] == "BOOL":
        return bytes(values)
    texts = [value.encode("utf-8") for value in values]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def _input(head: dict[str, Any]) -> dict[str, Any]:
    inputs = head.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise BadJson("`inputs` does not hold exactly one tensor")
    tensor = inputs[0]
    if tensor.get("name") != "image" or tensor.get("datatype") != "BYTES":
        raise BadJson("the input tensor is not named `image` with datatype BYTES")
    return tensor


def _images(tensor: dict[str, Any], binary: memoryview, most: int) -> list[bytes]:
    """Return the tensor's elements; they are counted while they are read, because a body has room for millions."""
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(isinstance(side, int) and not isinstance(side, bool) for side in shape):
        raise BadJson("`shape` is no list of whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise BadJson(f"`shape` has more than {MAX_DIMENSIONS} dimensions")
    size = _object(tensor.get("parameters"), "parameters").get("binary_data_size")
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, int) or size != len(binary):
            raise BadJson("`binary_data_size` is not the number of bytes after the JSON")
        images = _unpack(binary, most)
    else:
        images = _decode(tensor.get("data"), most)
    if not images or math.prod(shape) != len(images):
        raise BadJson(f"`shape` {shape} does not hold the {len(images)} elements that came")
    return images


def _unpack(binary: memoryview, most: int) -> list[bytes]:
    images: list[bytes] = []
    start = 0
    while start < len(binary):
        if len(images) == most:
            raise TooManyFiles(most)
        end = start + 4 + int.from_bytes(binary[start : start + 4], "little")
        if end > len(binary):
            raise BadJson("an element is longer than the bytes that are left")
        images.append(bytes(binary[start + 4 : end]))
        start = end
    return images


def _decode(data: object, most: int) -> list[bytes]:
    if not isinstance(data, list):
        raise BadJson("`data` is no list")
    if sum(len(row) if isinstance(row, list) else 1 for row in data) > most:
        raise TooManyFiles(most)
    flat = [item for row in data for item in (row if isinstance(row, list) else [row])]
    try:
        return [base64.b64decode(item, validate=True) for item in flat]
    except (binascii.Error, TypeError, ValueError) as error:
        raise BadJson("an element of `data` is no base64") from error


def _outputs(head: dict[str, Any], parameters: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    default = parameters.get("binary_data_output") is True
    wanted = head.get("outputs")
    if not wanted:
        return tuple((name, default) for name in DEFAULT_OUTPUTS)
    if not isinstance(wanted, list) or not all(isinstance(item, dict) for item in wanted):
        raise BadJson("`outputs` is no list of objects")
    if len(wanted) > len(OUTPUTS) or len({str(item.get("name")) for item in wanted}) < len(wanted):
        raise BadJson("`outputs` names an output twice")
    chosen = []
    for item in wanted:
        if item.get("name") not in OUTPUTS:
            raise BadJson(f"an output is not one of {', '.join(OUTPUTS)}")
        own = _object(item.get("parameters"), "parameters").get("binary_data")
        chosen.append((str(item["name"]), own if isinstance(own, bool) else default))
    return tuple(chosen)


def _object(value: object, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadJson(f"`{name}` is no object")
    return value
