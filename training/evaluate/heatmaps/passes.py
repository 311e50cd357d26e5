"""Heatmaps of many images on a network in full precision, of any input size."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from handlers.engines import Outputs, softmax
from handlers.engines.with_evidence import WithEvidence
from handlers.evidence.heatmaps import FORWARD_METHODS, heatmap
from handlers.explain import Explainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Explanation

Explain: TypeAlias = "Callable[[nn.Module, NDArray[np.float32], NDArray[np.intp]], NDArray[np.float32]]"
"""From a network, images (N, 3, H, W) and targets (N,) to heatmaps (N, H, W)."""

LAST = "layer4"
SHARP_LAYER = "layer3"
"""The layer whose activations sharpen heatmaps, unless the contract names another."""

_BATCH = 100  # images of one pass


def run(network: nn.Module, images: NDArray[np.float32], sharp_layer: str | None = None) -> Outputs:
    """Return the outputs of one forward pass over `images` (N, 3, H, W), of any size, at temperature 1."""
    module = WithEvidence(network.eval(), sharp_layer or SHARP_LAYER)
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits, *evidence = (output.float().cpu().numpy() for output in module(torch.from_numpy(images).to(device)))
    return Outputs(softmax(logits, 1.0), *evidence)


def explain(
    network: nn.Module, choice: Explanation, images: NDArray[np.float32], targets: NDArray[np.intp]
) -> NDArray[np.float32]:
    """Return the heatmaps (N, H, W) of any number of normalised images, by the choice's own method."""
    explainer = None
    if choice.method not in FORWARD_METHODS:
        own = replace(choice, methods=(choice.method,))
        explainer = Explainer(network, own, device=next(network.parameters()).device)
    parts = []
    for start in range(0, len(images), _BATCH):
        batch, wanted = images[start : start + _BATCH], targets[start : start + _BATCH]
        if explainer is not None:
            parts.append(explainer.heatmaps(batch, wanted.tolist(), choice.method))
        else:
            outputs = run(network, batch, choice.sharp_layer)
            size = (images.shape[2], images.shape[3])
            parts.append(heatmap(outputs, wanted, choice.method, size)[0])
    return np.concatenate(parts)


def by(choice: Explanation, passes: Passes | None = None) -> Explain:
    """Return `explain` with that choice; `passes` keeps the outputs that several methods and targets share."""
    if passes is None or choice.method not in FORWARD_METHODS:
        return lambda network, images, targets: explain(network, choice, images, targets)

    def explain_kept(network: nn.Module, images: NDArray[np.float32], targets: NDArray[np.intp]) -> NDArray[np.float32]:
        if network is not passes.network:
            return explain(network, choice, images, targets)
        outputs = passes.outputs(images, choice.sharp_layer)
        return heatmap(outputs, targets, choice.method, (images.shape[2], images.shape[3]))[0]

    return explain_kept


class Passes:
    """One network's outputs for sets of images, computed once for each set and sharp layer, and kept."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._kept: list[tuple[NDArray[np.float32], str | None, Outputs]] = []

    def outputs(self, images: NDArray[np.float32], sharp_layer: str | None) -> Outputs:
        """Return the outputs for `images`, which must stay as they are: they are told by identity."""
        for known, layer, outputs in self._kept:
            if known is images and layer == (sharp_layer or SHARP_LAYER):
                return outputs
        starts = range(0, len(images), _BATCH)
        parts = [run(self.network, images[start : start + _BATCH], sharp_layer) for start in starts]
        made = Outputs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        self._kept.append((images, sharp_layer or SHARP_LAYER, made))
        return made


def random_heat(_network: nn.Module, images: NDArray[np.float32], targets: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return heat that knows nothing: the control of every measure."""
    rng = np.random.default_rng(zlib.crc32(images.tobytes() + targets.tobytes()))
    return rng.random((len(images), *images.shape[2:]), dtype=np.float32)
