"""Engines that run the network: each takes prepared images and returns probabilities.

An engine is built from the contract's `engine` (or `fallback`) entry. Its temperature divides the logits before the
softmax.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from handlers.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Engine as EngineChoice

MAX_BATCH = 64
"""Images in one forward pass: throughput is flat from 32 on, memory grows with every image."""

OPENVINO_FILES = {"fp32": "openvino.xml", "bf16": "openvino.xml", "int8": "openvino-int8.xml"}
"""The engine's file in the archive by precision; its weights lie beside it as `.bin`."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine(Protocol):
    """Runs the network."""

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The classes' probabilities, (N, K) float32, for images (N, 3, H, W) float32, N ≥ 1."""

    def buffer(self, count: int) -> NDArray[np.float32] | None:
        """The engine's memory for `count` images until the next call, from where `predict` need not copy; or None."""


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

    def buffer(self, count: int) -> None:
        """See `Engine.buffer`."""


class OpenVINOEngine:
    """OpenVINO on the CPU, from the files that training/package/quantise.py wrote: `fp32`, `bf16` or `int8`.

    One stream of OMP_NUM_THREADS threads, not pinned: a worker is a process, and several pin to the same first core.
    """

    def __init__(self, directory: Path, *, precision: str, temperature: float) -> None:
        """Compiles the model for any batch length.

        Raises:
            EngineError: OpenVINO is not installed, has no such file or cannot compile it, or the precision is unknown.
        """
        if precision not in OPENVINO_FILES:
            raise EngineError(f"the openvino engine computes in {', '.join(OPENVINO_FILES)}, not in {precision!r}")
        try:
            import openvino  # noqa: PLC0415 - an archive with the eager engine does without it
        except ImportError as error:
            raise EngineError("openvino is not installed") from error
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": thread_count(),
            "ENABLE_CPU_PINNING": False,
            # What INT8 leaves unquantised is little: in bf16 it is no faster, only less exact.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        try:
            core = openvino.Core()
            model = core.read_model(directory / OPENVINO_FILES[precision])
            # In the graph the softmax costs nothing; outside, six calls of NumPy cost 0.05 ms of one image's 3.
            logits = openvino.opset13.multiply(model.get_results()[0].input_value(0), np.float32(1 / temperature))
            model = openvino.Model([openvino.opset13.softmax(logits, 1)], model.get_parameters())
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise EngineError(f"openvino cannot run {OPENVINO_FILES[precision]}: {error}") from error
        self._request = compiled.create_infer_request()
        self._input = self._request.get_input_tensor()
        self._images: NDArray[np.float32] = self._input.data

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Engine.predict`."""
        own = self.buffer(len(images))
        if images is not own:
            own[:] = images
        probabilities: NDArray[np.float32] = self._request.infer()[0]
        return probabilities

    def buffer(self, count: int) -> NDArray[np.float32]:
        """See `Engine.buffer`."""
        # Reuses the bound tensor through a kept view: binding another one, or asking again for the view or the shape,
        # costs 0.1 ms of one image's 3 ms.
        if len(self._images) != count:
            self._input.shape = (count, *self._images.shape[1:])
            self._images = self._input.data
        return self._images


def build_engine(choice: EngineChoice, network: nn.Module | None, *, directory: Path, device: torch.device) -> Engine:
    """The engine that `choice` names, around `network` (fp32, eval) or from its own files in `directory`.

    Raises:
        EngineError: no such engine, it cannot run here, or it needs the network and has none.
    """
    if choice.name == "eager":
        if network is None:
            raise EngineError("the eager engine needs the network")
        return EagerEngine(network, precision=choice.precision, temperature=choice.temperature, device=device)
    if choice.name == "openvino":
        return OpenVINOEngine(directory, precision=choice.precision, temperature=choice.temperature)
    raise EngineError(f"unknown engine {choice.name!r}: use eager or openvino")


def thread_count() -> int:
    """This process's share of the cores: OMP_NUM_THREADS, which the agent sets for its workers, else one."""
    return int(os.environ.get("OMP_NUM_THREADS") or 1)


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """`softmax(logits / temperature)` over the last axis, float32.

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    scaled = np.subtract(logits, logits.max(axis=-1, keepdims=True), dtype=np.float64)
    scaled /= temperature
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=-1, keepdims=True)
    probabilities: NDArray[np.float32] = scaled.astype(np.float32)
    return probabilities


def predict_all(engine: Engine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probabilities of any number of images, in forwards of at most `MAX_BATCH`."""
    if len(images) <= MAX_BATCH:
        return engine.predict(images)
    return np.concatenate(
        [engine.predict(images[start : start + MAX_BATCH]) for start in range(0, len(images), MAX_BATCH)]
    )
