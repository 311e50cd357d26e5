"""Tests of heatmaps: their pixels must decide the answer, and they must depend on the weights.

Deletion greys an image's pixels from the hottest to the coldest; insertion brings them back, in the same order, into
the blurred image. Where the hot pixels decide, confidence in the explained class falls fast and rises fast: the area
under the first curve is small, that under the second large. What a heatmap must beat is pixels in random order, and the
heatmap of another image: random pixels spoil an image like noise, so deletion alone says little against them.
Source: Petsiuk et al. 2018, section 4.3, https://arxiv.org/abs/1806.07421

A heatmap that stays the same when the weights become random shows the image, not what the network makes of it.
Source: Adebayo et al. 2018, section 3, https://arxiv.org/abs/1810.03292

A heatmap that stays the same when another class is asked for says nothing about the class: insertion and deletion do
not notice that, so the heatmaps of an image's likeliest and second class are compared too.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from tqdm import tqdm

from handlers.engines import predict_all
from handlers.explain import Explainer
from handlers.network import build_network
from training.errors import HeatmapsAlike

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract, Explanation
    from handlers.engines import Engine

LAYERS = ("layer2", "layer3", "layer4", "layer2+layer3")
"""The candidates; layer1 was far below them all in trials, other sums no better than the one."""

BLIND = {"eigencam"}
"""Methods that do not look at the class asked for: measured at the last layer, and no default for `explain this`."""

STEPS = 8
"""Pixels go in so many equal parts, each of which costs two forwards an image."""

BLUR = 1 / 8
"""The blur's standard deviation as a share of the image's side; the network then knows next to nothing."""

MAX_SIMILARITY = 0.5
"""The largest rank correlation with the heatmaps of random weights with which a candidate may be chosen."""

MAX_ALIKE = 0.5
"""The largest rank correlation of an image's heatmaps for its first and second class with which a version is packed."""

SIMILARITY_IMAGES = 100
"""Images on which rank correlations are taken; the mean's standard error is then about 0.04."""

_BATCH = 100  # images of one backward


@dataclass(frozen=True)
class Faithfulness:
    """The mean confidence in the explained class as pixels go (`deletion`) and come back (`insertion`), in equal steps.

    The areas lie under the curves, over the share of the pixels from 0 to 1; `score` is insertion's less deletion's.
    """

    score: float
    deletion_area: float
    insertion_area: float
    deletion: list[float]
    insertion: list[float]


class Probe:
    """Images, an engine's answers to them, and its answers to what is left of them; the answers are what to explain.

    Attributes:
        images: (N, 3, H, W) float32, normalised.
        targets: (N,) the classes that the engine answered.
        runners_up: (N,) the classes that it found second likeliest.
    """

    def __init__(self, engine: Engine, images: NDArray[np.float32]) -> None:
        self.images = images
        self._engine = engine
        whole = predict_all(engine, images)
        self.targets, self.runners_up = first_two(whole)
        sigma = BLUR * images.shape[-1]
        self._blurred = gaussian_filter(images, (0, 0, sigma, sigma))
        grey = predict_all(engine, np.zeros_like(images[:1]))  # the training data's mean colour
        self._whole = self._confidence(whole)
        self._grey = self._confidence(grey.repeat(len(images), axis=0))
        self._unsharp = self._confidence(predict_all(engine, self._blurred))

    def measure(self, heatmaps: NDArray[np.float32]) -> Faithfulness:
        """Return the faithfulness of `heatmaps` (N, H, W); pixels of equal heat go in random order."""
        heat = heatmaps.reshape(len(heatmaps), -1)
        order = np.lexsort((np.random.default_rng(0).random(heat.shape), -heat))
        ranks = np.argsort(order).reshape(len(heat), 1, *heatmaps.shape[1:])
        deletion, insertion = [self._whole], [self._unsharp]
        for step in range(1, STEPS):
            hot = ranks < step / STEPS * heat.shape[1]
            greyed, restored = np.where(hot, np.float32(0), self.images), np.where(hot, self.images, self._blurred)
            deletion.append(self._confidence(predict_all(self._engine, greyed)))
            insertion.append(self._confidence(predict_all(self._engine, restored)))
        deletion.append(self._grey)
        insertion.append(self._whole)
        out, back = (float(np.trapezoid(curve, dx=1 / STEPS)) for curve in (deletion, insertion))
        return Faithfulness(back - out, out, back, deletion, insertion)

    def measure_random(self) -> Faithfulness:
        """Return the faithfulness of pixels in random order."""
        return self.measure(np.zeros_like(self.images[:, 0]))

    def _confidence(self, probabilities: NDArray[np.float32]) -> float:
        return float(probabilities[np.arange(len(self.targets)), self.targets].mean(dtype=np.float64))


def choose_explanation(
    network: nn.Module,
    contract: Contract,
    engine: Engine,
    images: NDArray[np.float32],
    *,
    max_alike: float = MAX_ALIKE,
) -> tuple[Explanation, dict[str, Any]]:
    """Return the layer and the method that `best_of` finds on `images` (N, 3, H, W), and the report on all candidates.

    Args:
        network: full precision; what heatmaps are computed on.
        contract: the version's; `explain.methods` are the methods measured.
        engine: the version's; its confidence is what curves are made of.
        images: held-out images, normalised.
        max_alike: the largest rank correlation of the first two classes' heatmaps.

    Raises:
        HeatmapsAlike: no candidate's heatmaps depend on the class.
    """
    probe = Probe(engine, images)
    shown = slice(0, SIMILARITY_IMAGES)
    scrambled = [*randomised(network, contract)][-1][1]
    rows: list[dict[str, Any]] = []
    methods = contract.explain.methods
    candidates = [(layer, method) for layer in LAYERS for method in methods if method not in BLIND]
    candidates += [("layer4", method) for method in methods if method in BLIND]
    for layer, method in tqdm(candidates, desc="explanations", unit="candidate"):
        choice = replace(contract.explain, layer=layer, method=method)
        heatmaps = explain(network, choice, images, probe.targets)
        random = explain(scrambled, choice, images[shown], probe.targets[shown])
        second = explain(network, choice, images[shown], probe.runners_up[shown])
        facts = {
            "layer": layer,
            "method": method,
            "similarity": float(rank_correlation(heatmaps[shown], random).mean()),
            "class_similarity": float(rank_correlation(heatmaps[shown], second).mean()),
        }
        rows.append(facts | asdict(probe.measure(heatmaps)))
    best = best_of(rows, max_alike)
    if best["class_similarity"] > max_alike:
        raise HeatmapsAlike(
            best["layer"], best["method"], best["class_similarity"], limit=max_alike, images=len(images[shown])
        )
    report: dict[str, Any] = {
        "schema": 1,
        "images": len(images),
        "steps": STEPS,
        "chosen": {"layer": best["layer"], "method": best["method"]},
        "random": asdict(probe.measure_random()),
        "candidates": sorted(rows, key=lambda row: -row["score"]),
    }
    return replace(contract.explain, **report["chosen"]), report


def best_of(candidates: list[dict[str, Any]], max_alike: float = MAX_ALIKE) -> dict[str, Any]:
    """Return the candidate with the best score among those that depend on the class and on the weights.

    Where none depends on the class, it is the one that depends on it most.
    """
    seeing = [row for row in candidates if row["method"] not in BLIND]
    about = [row for row in seeing if row["class_similarity"] <= max_alike]
    if not about:
        return min(seeing or candidates, key=lambda row: row["class_similarity"])
    sound = [row for row in about if row["similarity"] <= MAX_SIMILARITY]
    return max(sound or about, key=lambda row: row["score"])  # of a network that learnt little, none may be sound


def check_classes_differ(
    network: nn.Module,
    choice: Explanation,
    images: NDArray[np.float32],
    scores: NDArray[np.float32],
    max_alike: float = MAX_ALIKE,
) -> float:
    """Return the mean rank correlation of each image's heatmaps for its first and its second class.

    Args:
        network: full precision; what heatmaps are computed on.
        choice: layer and method of the heatmaps.
        images: (N, 3, H, W), normalised.
        scores: (N, K) logits or probabilities, which say the first and the second class.
        max_alike: the largest correlation that passes.

    Raises:
        HeatmapsAlike: the correlation is larger.
    """
    first, second = (explain(network, choice, images, targets) for targets in first_two(scores))
    correlation = float(rank_correlation(first, second).mean())
    if correlation > max_alike:
        raise HeatmapsAlike(choice.layer, choice.method, correlation, limit=max_alike, images=len(images))
    return correlation


def first_two(scores: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the likeliest and the second likeliest class, (N,) each, by `scores` (N, K)."""
    ranked = np.argsort(-scores, axis=1)
    return ranked[:, 0], ranked[:, 1]


def measure_explanation(
    network: nn.Module, contract: Contract, engine: Engine, images: NDArray[np.float32]
) -> dict[str, Any]:
    """The report on the contract's own layer and method, on `images` (N, 3, H, W).

    `random` is what pixels in random order reach, `stranger` what the heatmap of another image does. `randomised`
    holds the mean rank correlation between the network's heatmaps and those of a network whose weights are random from
    the head down to the layer named; `stranger_similarity` that between heatmaps of different images, and
    `class_similarity` that between an image's heatmaps for its first and its second class.
    """
    probe = Probe(engine, images)
    heatmaps = explain(network, contract.explain, images, probe.targets)
    strangers = np.roll(heatmaps, 1, axis=0)
    return {
        "layer": contract.explain.layer,
        "method": contract.explain.method,
        "images": len(images),
        "steps": STEPS,
        **asdict(probe.measure(heatmaps)),
        "random": asdict(probe.measure_random()),
        "stranger": asdict(probe.measure(strangers)),
        "randomised": {
            name: float(rank_correlation(heatmaps, explain(scrambled, contract.explain, images, probe.targets)).mean())
            for name, scrambled in randomised(network, contract)
        },
        "stranger_similarity": float(rank_correlation(heatmaps, strangers).mean()),
        "class_similarity": float(
            rank_correlation(heatmaps, explain(network, contract.explain, images, probe.runners_up)).mean()
        ),
    }


def explain(
    network: nn.Module, choice: Explanation, images: NDArray[np.float32], targets: NDArray[np.intp]
) -> NDArray[np.float32]:
    """The heatmaps (N, H, W) of any number of normalised images, by the choice's own method."""
    explainer = Explainer(network, choice, device=next(network.parameters()).device)
    parts = [
        explainer.heatmaps(images[start : start + _BATCH], targets[start : start + _BATCH].tolist(), choice.method)
        for start in range(0, len(images), _BATCH)
    ]
    return np.concatenate(parts)


def randomised(network: nn.Module, contract: Contract, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Networks whose weights are random from the head down: the layer that was the last to lose them, the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
