"""Reads the network of an unpacked archive. Imports torchvision, which a worker that only predicts can do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import load_file

from handlers.build import BrokenArchive
from handlers.network import build_network

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from contracts.model import Contract

WEIGHTS = "weights.safetensors"


def load_network(directory: Path, contract: Contract) -> nn.Module:
    """The contract's network with the archive's weights, in float32 whatever precision they are stored in.

    Raises:
        BrokenArchive: the architecture is unknown, or the weights are unreadable or do not fit it.
    """
    try:
        network: nn.Module = build_network(contract.architecture, len(contract.classes))
        weights = load_file(directory / WEIGHTS)
        network.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    except Exception as error:  # safetensors raises an error of its own beside OSError; torch RuntimeError
        raise BrokenArchive(f"{WEIGHTS} does not load into {contract.architecture}: {error}") from error
    return network.eval()
