"""The engines' interface: prepared images in, probabilities and what evidence is made of out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_BATCH = 64
"""Images in one forward pass: throughput is flat from 32 on, memory grows with every image."""

OPENVINO_FILES = {"fp32": "openvino.xml", "bf16": "openvino.xml", "int8": "openvino-int8.xml"}
"""The engine's file in the archive by precision; its weights lie beside it as `.bin`."""


class Outputs(NamedTuple):
    """Arrays of one forward pass over N images, all float32.

    probabilities: (N, K). features: (N, D), the mean over places of the last layer's activations. maps: (N, K, h, w),
    the class maps `Σ_k w_ck A_k` of the last layer's activations A and the head's weights w. sharpness: (N, h', w'),
    the root mean square over channels of the activations of the contract's `explain.sharp_layer`.

    All but the probabilities are None if the network or the engine's file does not give them.
    Source: Zhou et al. 2016, equation 2, https://arxiv.org/abs/1512.04150
    """

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32] | None = None
    maps: NDArray[np.float32] | None = None
    sharpness: NDArray[np.float32] | None = None

    def take(self, rows: Sequence[int]) -> Outputs:
        """Return the outputs of some of the images, in the order of `rows`."""
        evidence = (None if array is None else array[rows] for array in self[1:])
        return Outputs(self.probabilities[rows], *evidence)


class Engine(Protocol):
    """Runs the network. The contract's temperature divides the logits before the softmax."""

    def run(self, images: NDArray[np.float32]) -> Outputs:
        """Return the outputs for images (N, 3, H, W) float32, N ≥ 1."""

    def buffer(self, count: int) -> NDArray[np.float32] | None:
        """Return the engine's memory for `count` images, valid until the next call, to spare `run` a copy; or None."""


def run_all(engine: Engine, images: NDArray[np.float32]) -> Outputs:
    """Return the outputs for any number of images, in forwards of at most `MAX_BATCH`."""
    if len(images) <= MAX_BATCH:
        return engine.run(images)
    parts = [engine.run(images[start : start + MAX_BATCH]) for start in range(0, len(images), MAX_BATCH)]
    columns = zip(*(part[1:] for part in parts), strict=True)
    evidence = (None if arrays[0] is None else np.concatenate(arrays) for arrays in columns)
    return Outputs(np.concatenate([part.probabilities for part in parts]), *evidence)


def predict_all(engine: Engine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the probabilities (N, K) of any number of images."""
    return run_all(engine, images).probabilities


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Return `softmax(logits / temperature)` over the last axis, float32.

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    scaled = np.subtract(logits, logits.max(axis=-1, keepdims=True), dtype=np.float64)
    scaled /= temperature
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=-1, keepdims=True)
    probabilities: NDArray[np.float32] = scaled.astype(np.float32)
    return probabilities


def thread_count() -> int:
    """Return this process's share of the cores: OMP_NUM_THREADS, which the agent sets for its workers, else one."""
    return int(os.environ.get("OMP_NUM_THREADS") or 1)
