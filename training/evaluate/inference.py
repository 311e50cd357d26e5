"""Outputs for many images in memory, preprocessed as serving does it; used to validate, evaluate and calibrate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from handlers.engines import MAX_BATCH, run_all
from handlers.preprocess import normalise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from contracts.model import Input
    from handlers.engines import Engine

_CHUNK = 256  # images normalised at a time


def predict_logits(
    network: nn.Module,
    images: NDArray[np.uint8],
    size: Input,
    *,
    device: torch.device | None = None,
    bf16: bool = False,
    batch_size: int = MAX_BATCH,
) -> Tensor:
    """Logits (N, K) float32 on the CPU, of `images` (N, H, W, 3) uint8 of the contract's height and width.

    The network is put into evaluation mode and left in it.
    """
    device = device or torch.device("cpu")
    return compute_logits(network, normalised_batches(images, size, device, batch_size), device=device, bf16=bf16)


def normalised_batches(
    images: NDArray[np.uint8], size: Input, device: torch.device, batch_size: int
) -> Iterator[Tensor]:
    """Yield `images` as the network takes them, (N, 3, H, W) float32 on `device`, N up to `batch_size`."""
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(normalise(images[start : start + batch_size], size))
        yield batch.to(device).contiguous(memory_format=torch.channels_last)


def compute_logits(
    network: nn.Module, batches: Iterable[Tensor], *, device: torch.device, bf16: bool = False
) -> Tensor:
    """Return the logits (N, K) float32 on the CPU, of normalised `batches` that lie on `device`.

    The network is put into evaluation mode and left in it.
    """
    network.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return torch.cat([network(batch).float().cpu() for batch in batches])


def run_engine(
    engine: Engine, images: NDArray[np.uint8], size: Input
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return probabilities (N, K) and pooled features (N, D) of `images` (N, H, W, 3) uint8; None if it gives none."""
    probabilities, features = [], []
    for start in range(0, len(images), _CHUNK):
        outputs = run_all(engine, normalise(images[start : start + _CHUNK], size))
        probabilities.append(outputs.probabilities)
        features.append(outputs.features)  # the maps are let go: of many classes they fill the memory
    pooled = [part for part in features if part is not None]
    return np.concatenate(probabilities), np.concatenate(pooled) if pooled else None
