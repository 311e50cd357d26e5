"""Sensitivity of heatmaps to the class asked for and to the weights.

A heatmap that stays the same when another class is asked for says nothing about the class. One that stays the same when
weights become random shows the image, not what the network makes of it.
Source: Adebayo et al. 2018, section 3, https://arxiv.org/abs/1810.03292

A random head alone leaves the last activations as they are: they are strongest on the object, so a random class's map
is like the right one's or like its negative, by luck. One random head says little: the figure is a mean over several.
The random weights must not be those that the training began with. What it learnt still fits these: cifar10 0.8.0's
report compared with them, and found 0.80 where other random heads give 0.26.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import rankdata

from handlers.network import build_network

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract
    from training.evaluate.heatmaps.passes import Explain

HEADS = 8
"""Random heads, whose correlations are averaged; they scatter by 0.15."""

RANDOM_IMAGES = 50

_SEED = 1_000_003  # far from the seeds that people train with


def class_correlation(
    network: nn.Module, explain: Explain, images: NDArray[np.float32], first: NDArray[np.intp], second: NDArray[np.intp]
) -> float:
    """Return the mean rank correlation of each image's heatmaps for two classes, (N,) each."""
    return float(rank_correlation(explain(network, images, first), explain(network, images, second)).mean())


@dataclass(frozen=True)
class RandomNetworks:
    """Networks that share their early layers with one network, and whose late layers are random.

    Attributes:
        heads: only the head is random, each time another one.
        cumulative: random from the head down to a layer, by that layer's name.
    """

    heads: tuple[nn.Module, ...]
    cumulative: tuple[tuple[str, nn.Module], ...]


def randomise(network: nn.Module, contract: Contract) -> RandomNetworks:
    """Return the random networks of `network`, which keeps its weights."""
    layers = [name for name, layer in reversed([*network.named_children()]) if any(True for _ in layer.parameters())]
    heads = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        fresh = build_network(contract.architecture, len(contract.classes)).eval()
        fresh.to(next(network.parameters()).device)
        for _ in range(HEADS):
            head = copy.deepcopy(fresh.get_submodule(layers[0]))
            head.reset_parameters()
            heads.append(_replaced(network, {layers[0]: head}))
    cumulative = []
    for count, name in enumerate(layers[1:], 2):
        cumulative.append((name, _replaced(network, {layer: fresh.get_submodule(layer) for layer in layers[:count]})))
    return RandomNetworks(tuple(heads), tuple(cumulative))


def _replaced(network: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Return the network with other layers by name; it shares all others."""
    memo = {id(layer): layers.get(name, layer) for name, layer in network.named_children()}
    return copy.deepcopy(network, memo)


def randomised_correlations(
    network: nn.Module,
    random: RandomNetworks,
    explain: Explain,
    images: NDArray[np.float32],
    targets: NDArray[np.intp],
) -> tuple[float, dict[str, float]]:
    """Return the mean rank correlation with the heatmaps of random heads, and by layer of those random down to it."""
    images, targets = images[:RANDOM_IMAGES], targets[:RANDOM_IMAGES]
    own = explain(network, images, targets)

    def alike(other: nn.Module) -> float:
        return float(rank_correlation(own, explain(other, images, targets)).mean())

    return float(np.mean([alike(head) for head in random.heads])), {
        name: alike(other) for name, other in random.cumulative
    }


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Spearman's correlation of each heatmap of `first` (N, H, W) with its like of `second`; 0 where one is even."""
    ranks = [rankdata(heatmaps.reshape(len(heatmaps), -1), axis=1) for heatmaps in (first, second)]
    one, other = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    product: NDArray[np.float64] = (one * other).sum(axis=1)
    correlation: NDArray[np.float64] = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return correlation
