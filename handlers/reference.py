"""The reference inputs of an archive, by which any server sees whether it computes what training computed."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from handlers.build import ArchiveError, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from contracts.model import Contract

REFERENCE = "reference.json"


@dataclass(frozen=True)
class Reference:
    """Inputs with the outputs that the contract's engine gave when the version was packed.

    images: encoded images; probabilities: (N, K) float32; tolerance: how far a right engine may be off.
    """

    images: list[bytes]
    probabilities: NDArray[np.float32]
    tolerance: float


def load_reference(directory: Path, contract: Contract, *, of_fallback: bool = False) -> Reference:
    """The archive's reference inputs with the outputs of its engine, or of its fallback.

    Raises:
        ArchiveError: the file is missing, unreadable or does not fit the contract.
    """
    data = read_json(directory / REFERENCE)
    try:
        outputs = data["fallback"] if of_fallback else data
        images = [base64.b64decode(image, validate=True) for image in data["images"]]
        probabilities = np.asarray(outputs["probabilities"], dtype=np.float32)
        reference = Reference(images, probabilities, float(outputs["tolerance"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{REFERENCE} has the wrong form: {error!r}") from error
    if not images or probabilities.shape != (len(images), len(contract.classes)):
        raise ArchiveError(f"{REFERENCE} does not hold one probability per image and class")
    return reference
