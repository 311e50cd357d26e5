"""PyTorch as it is."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from handlers.engines.base import Outputs, softmax
from handlers.engines.with_evidence import WithEvidence, gives_evidence
from handlers.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class EagerEngine:
    """PyTorch as it is, in channels_last: `fp32`, or `bf16` weights and activations."""

    def __init__(
        self,
        network: nn.Module,
        *,
        precision: str,
        temperature: float,
        device: torch.device | str,
        sharp_layer: str | None = None,
    ) -> None:
        """Copy the weights, but in fp32 share them: `network` itself is moved to `device` and into channels_last.

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
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._module: nn.Module = network
        if sharp_layer is not None and gives_evidence(network, sharp_layer):
            self._module = WithEvidence(network, sharp_layer)

    def run(self, images: NDArray[np.float32]) -> Outputs:
        """See `Engine.run`."""
        batch = torch.from_numpy(images).to(device=self._device, dtype=self._dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            found = self._module(batch)
        logits, *evidence = (
            output.float().cpu().numpy() for output in (found if isinstance(found, tuple) else [found])
        )
        return Outputs(softmax(logits, self._temperature), *evidence)

    def buffer(self, count: int) -> None:
        """See `Engine.buffer`."""
