from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from handlers.archive import load_network
from handlers.build import BrokenArchive


def test_weights_of_another_architecture_are_refused(unpacked, contract):
    with pytest.raises(BrokenArchive, match="does not load into resnet18:"):
        load_network(unpacked, replace(contract, architecture="resnet18"))


def test_half_precision_weights_are_loaded_as_float32(unpacked, contract, network):
    save_file(
        {name: (w.half() if w.is_floating_point() else w).contiguous() for name, w in network.state_dict().items()},
        unpacked / "weights.safetensors",
    )
    loaded = load_network(unpacked, contract)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training
