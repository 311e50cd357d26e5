"""Build the engine that a contract names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from handlers.engines.openvino import OpenVINOEngine
from handlers.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from contracts.model import Engine as EngineChoice
    from handlers.engines.base import Engine


def build_engine(
    choice: EngineChoice,
    load_network: Callable[[], nn.Module] | None,
    *,
    directory: Path,
    device: torch.device | str,
    sharp_layer: str | None = None,
) -> Engine:
    """Return the engine that `choice` names, around the network or from its own files in `directory`.

    Args:
        choice: the contract's engine or its fallback.
        load_network: returns the network (fp32, eval); called only for an engine that needs it.
        directory: the version's files.
        device: where an eager engine computes.
        sharp_layer: the contract's; without it an eager engine gives probabilities alone. OpenVINO's file has its own.

    Raises:
        EngineError: no such engine, it cannot run here, or it needs the network and has none.
    """
    if choice.name == "eager":
        if load_network is None:
            raise EngineError("the eager engine needs the network")
        from handlers.engines.eager import EagerEngine  # noqa: PLC0415 - torch

        return EagerEngine(
            load_network(),
            precision=choice.precision,
            temperature=choice.temperature,
            device=device,
            sharp_layer=sharp_layer,
        )
    if choice.name == "openvino":
        return OpenVINOEngine(directory, precision=choice.precision, temperature=choice.temperature)
    raise EngineError(f"unknown engine {choice.name!r}: use eager or openvino")
