"""Logits of many images in memory, preprocessed as serving does it; used to validate, evaluate and calibrate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from handlers.preprocess import normalise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from contracts.model import Input


def predict_logits(
    network: nn.Module,
    images: NDArray[np.uint8],
    size: Input,
    *,
    device: torch.device | None = None,
    bf16: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Logits (N, K) float32 on the CPU, of `images` (N, H, W, 3) uint8 of the contract's height and width.

    The network is put into evaluation mode and left in it.
    """
    device = device or torch.device("cpu")
    network.eval()
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(normalise(images[start : start + batch_size], size))
            batch = batch.to(device).contiguous(memory_format=torch.channels_last)
            parts.append(network(batch).float().cpu())
    return torch.cat(parts)
