"""The reference inputs of an archive (`reference.json`): by them any server sees if it computes what training computed.

Training writes them, the handler checks itself by them when it loads, and the agent checks the loaded version by them
through the real server.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import Any

from contracts.fields import DocumentError, Fields

FILE = "reference.json"
MAX_BYTES = 64_000_000
MAX_IMAGES = 1024
_ROUNDING = 1e-3  # a sum of exponentials in float32 may leave a probability just above 1


class BadReference(DocumentError):
    """Reference inputs that cannot be used."""

    document = FILE
    remedy = "pack the model again (`gradserve package`)"


@dataclass(frozen=True)
class Reference:
    """Inputs with the outputs of the contract's engine when the version was packed.

    Attributes:
        tolerance: how far a probability of a right engine may be off, between 0 and 1.
        images: encoded images.
        probabilities: of each image, one for each class of the contract.
        fallback: the same inputs with what the contract's fallback engine computes; None where there is none.
    """

    tolerance: float
    images: tuple[bytes, ...]
    probabilities: tuple[tuple[float, ...], ...]
    fallback: Reference | None = None


def dump(reference: Reference) -> dict[str, Any]:
    """Return the reference as JSON-able data, such that `parse(dump(reference), classes) == reference`."""
    data = {"images": [base64.b64encode(image).decode("ascii") for image in reference.images], **_outputs(reference)}
    return data if reference.fallback is None else data | {"fallback": _outputs(reference.fallback)}


def parse(data: object, classes: int) -> Reference:
    """Return the reference that `data` (parsed JSON) describes, for a contract of so many classes.

    Raises:
        BadReference: a field is missing or impossible, or inputs and outputs do not match.
    """
    fields = Fields(data, "", BadReference)
    images = tuple(_image(fields, text) for text in fields.items("images", most=MAX_IMAGES))
    if not images:
        raise fields.refuse("images", [], "one image or more")
    reference = _parse_outputs(fields, images, classes)
    fallback = fields.maybe("fallback", fields.inner)
    return reference if fallback is None else replace(reference, fallback=_parse_outputs(fallback, images, classes))


def _outputs(reference: Reference) -> dict[str, Any]:
    return {"tolerance": reference.tolerance, "probabilities": [list(row) for row in reference.probabilities]}


def _image(fields: Fields, text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError as error:
        raise fields.refuse("images", text, "images in base64") from error


def _parse_outputs(fields: Fields, images: tuple[bytes, ...], classes: int) -> Reference:
    rows = fields.table("probabilities", rows=len(images), columns=classes, least=-_ROUNDING, most=1 + _ROUNDING)
    return Reference(fields.number("tolerance", least=1e-9, most=1 - 1e-9), images, rows)
