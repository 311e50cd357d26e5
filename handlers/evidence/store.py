"""Read `evidence.safetensors`: the tensors of the archive that an image is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from handlers.build import BrokenArchive

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

EVIDENCE = "evidence.safetensors"

Store: TypeAlias = "dict[str, NDArray[Any]]"
"""Tensors by name; M is the number of training images in the index, D that of features, K that of classes.

| tensor | holds |
|---|---|
| `features` (M, D) | unit vectors of training images' pooled features, sorted by label; float16 in the file |
| `labels` (M,) int32 | their classes |
| `thumbnails` uint8, `thumbnail_ends` (M,) int64 | WebP files of these images one after another, and where each ends |
| `familiarity_scores` float32 | sorted scores of held-out images, higher for a more familiar image |
| `answer_set_scores` float32 | sorted conformal scores of held-out images: 1 - probability of the right class |

The other tensors are those of the familiarity method (handlers/evidence/familiar.py).
"""


def read_store(directory: Path) -> Store:
    """Return the tensors in an unpacked archive's `evidence.safetensors`, those in half precision as float32.

    Raises:
        BrokenArchive: the file is missing or damaged.
    """
    try:
        tensors = load_file(directory / EVIDENCE)
    except (OSError, SafetensorError) as error:
        raise BrokenArchive(f"{EVIDENCE} cannot be read ({error}): pack the model again") from error
    # Converted once, for all who use them: NumPy multiplies half-precision matrices without BLAS.
    return {
        name: tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor for name, tensor in tensors.items()
    }


def unit_vectors(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return features (N, D) scaled to length 1; a vector of zeros stays as it is."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    unit: NDArray[np.float32] = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
