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
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import rankdata

from handlers.network import build_network

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def randomised_correlations(
    network: nn.Module, contract: Contract, explain: Explain, images: NDArray[np.float32], targets: NDArray[np.intp]
) -> dict[str, float]:
    """Return the mean rank correlation with the heatmaps of networks that are random from the head down to a layer."""
    images, targets = images[:RANDOM_IMAGES], targets[:RANDOM_IMAGES]
    own = explain(network, images, targets)

    def alike(other: nn.Module) -> float:
        return float(rank_correlation(own, explain(other, images, targets)).mean())

    found = {name: alike(scrambled) for name, scrambled in randomised(network, contract)}
    head = next(iter(found))
    others = [alike(next(randomised(network, contract, number))[1]) for number in range(1, HEADS)]
    found[head] = float(np.mean([found[head], *others]))
    return found


def randomised(network: nn.Module, contract: Contract, number: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Yield networks random from the head down: the layer that was the last to lose its weights, the network.

    Args:
        network: keeps its own weights.
        contract: the network's.
        number: another one gives other random weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED + number)
        fresh = build_network(contract.architecture, len(contract.classes))
    network = copy.deepcopy(network)
    for name, layer in reversed([*network.named_children()]):
        if any(True for _ in layer.parameters()):
            layer.load_state_dict(fresh.get_submodule(name).state_dict())
            yield name, network


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Spearman's correlation of each heatmap of `first` (N, H, W) with its like of `second`; 0 where one is even."""
    ranks = [rankdata(heatmaps.reshape(len(heatmaps), -1), axis=1) for heatmaps in (first, second)]
    one, other = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    product: NDArray[np.float64] = (one * other).sum(axis=1)
    correlation: NDArray[np.float64] = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return correlation
