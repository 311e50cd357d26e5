"""Read the reference inputs of an unpacked archive for the engine that runs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from contracts import reference as archive_reference
from handlers.build import BrokenArchive, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from contracts.model import Contract


@dataclass(frozen=True)
class Reference:
    """Inputs with the outputs that one engine gave when the version was packed.

    images: encoded images; probabilities: (N, K) float32; tolerance: how far a right engine may be off.
    """

    images: tuple[bytes, ...]
    probabilities: NDArray[np.float32]
    tolerance: float


def load_reference(directory: Path, contract: Contract, *, of_fallback: bool = False) -> Reference:
    """Return the archive's reference inputs with the outputs of its engine, or of its fallback.

    Raises:
        BrokenArchive: the file is missing, unreadable or does not fit the contract.
    """
    data = read_json(directory / archive_reference.FILE)
    try:
        found = archive_reference.parse(data, len(contract.classes))
    except archive_reference.BadReference as error:
        raise BrokenArchive(str(error)) from error
    outputs = found.fallback if of_fallback else found
    if outputs is None:
        raise BrokenArchive(f"{archive_reference.FILE} has no outputs of the fallback engine: pack the model again")
    return Reference(outputs.images, np.asarray(outputs.probabilities, dtype=np.float32), outputs.tolerance)
