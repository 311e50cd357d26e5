"""OpenVINO on the CPU. Neither torch nor the network is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.engines.base import OPENVINO_FILES, Outputs, thread_count
from handlers.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

EVIDENCE = ("features", "maps", "sharpness")
"""The graph's outputs beside its first one, the logits; a file of before cifar10 0.10.0 has none of them."""


class OpenVINOEngine:
    """OpenVINO on the CPU, from the files that training/package/quantise.py wrote: `fp32`, `bf16` or `int8`.

    One stream of OMP_NUM_THREADS threads, not pinned: a worker is a process, and several pin to the same first core.
    """

    def __init__(self, directory: Path, *, precision: str, temperature: float) -> None:
        """Compile the model for any batch length.

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
            results = model.get_results()
            logits = openvino.opset13.multiply(results[0].input_value(0), np.float32(1 / temperature))
            outputs = [openvino.opset13.softmax(logits, 1).output(0), *_evidence(model)]
            model = openvino.Model(outputs, model.get_parameters())
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise EngineError(f"openvino cannot run {OPENVINO_FILES[precision]}: {error}") from error
        self._request = compiled.create_infer_request()
        self._input = self._request.get_input_tensor()
        self._images: NDArray[np.float32] = self._input.data

    def run(self, images: NDArray[np.float32]) -> Outputs:
        """See `Engine.run`."""
        own = self.buffer(len(images))
        if images is not own:
            own[:] = images
        return Outputs(*self._request.infer().values())

    def buffer(self, count: int) -> NDArray[np.float32]:
        """See `Engine.buffer`."""
        # Reuses the bound tensor through a kept view: binding another one, or asking again for the view or the shape,
        # costs 0.1 ms of one image's 3 ms.
        if len(self._images) != count:
            self._input.shape = (count, *self._images.shape[1:])
            self._images = self._input.data
        return self._images


def _evidence(model: Any) -> list[Any]:  # noqa: ANN401 - openvino.Model; openvino has no types
    """Return the outputs of the graph that evidence is made of, in the order of `Outputs`; none of an older file."""
    named = {name: output for output in model.outputs for name in output.get_names()}
    if not set(EVIDENCE) <= named.keys():
        return []
    return [named[name].get_node().input_value(0) for name in EVIDENCE]
