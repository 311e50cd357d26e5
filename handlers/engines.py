"""How a network is run: each engine takes prepared images and returns probabilities, whatever computes them.

An engine is built from the contract's `engine` (or `fallback`) entry. Its temperature divides the logits before the
softmax.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from handlers.contract import Engine as EngineChoice

MAX_BATCH = 64
"""Images in one forward pass: throughput is flat from 32 on, memory grows with every image."""


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class EngineError(RuntimeError):
    """An engine that cannot be built here; the message says which and why."""


class Engine(Protocol):
    """Runs the network."""

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The classes' probabilities, (N, K) float32, for images (N, 3, H, W) float32, N ≥ 1."""


class EagerEngine:
    """PyTorch as it is, in channels_last: `fp32`, or `bf16` weights and activations."""

    def __init__(self, network: nn.Module, *, precision: str, temperature: float, device: torch.device) -> None:
        """Keeps its own copy of the weights unless fp32 can share the network's.

        Raises:
            EngineError: the precision is neither `fp32` nor `bf16`.
        """
        if precision not in _DTYPES:
            raise EngineError(f"the eager engine computes in {' or '.join(_DTYPES)}, not in {precision!r}")
        self._dtype = _DTYPES[precision]
        self._device = device
        self._temperature = temperature
        if self._dtype != torch.float32:
            network = copy.deepcopy(network).to(self._dtype)
        network = network.to(device).eval()
        # torch's stub does not know the argument
        self._network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Engine.predict`."""
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(
                device=self._device, dtype=self._dtype, memory_format=torch.channels_last
            )
            logits: NDArray[np.float32] = self._network(batch).float().cpu().numpy()
        return softmax(logits, self._temperature)


def build_engine(choice: EngineChoice, network: nn.Module, *, directory: Path, device: torch.device) -> Engine:  # noqa: ARG001
    """The engine that `choice` names, around `network` (fp32, eval) or from its own files in `directory`.

    Raises:
        EngineError: no such engine, or it cannot run here.
    """
    if choice.name == "eager":
        return EagerEngine(network, precision=choice.precision, temperature=choice.temperature, device=device)
    raise EngineError(f"unknown engine {choice.name!r}: use eager")


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """`softmax(logits / temperature)` over the last axis, float32.

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    exponentials = np.exp(scaled)
    probabilities: NDArray[np.float32] = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(np.float32)
    return probabilities


def predict_all(engine: Engine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probabilities of any number of images, in forwards of at most `MAX_BATCH`."""
    parts = [engine.predict(images[start : start + MAX_BATCH]) for start in range(0, len(images), MAX_BATCH)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
