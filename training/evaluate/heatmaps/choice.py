"""The choice of a version's default heatmaps, by all measures on held-out images.

Thresholds on what a heatmap is about admit a candidate; the most faithful of the admitted ones is chosen. Faithfulness
alone chose cifar10 0.8.0's default, which was nearly blind to the class.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from contracts.evidence import HeatmapFigures
from handlers.engines.with_evidence import gives_evidence
from handlers.evidence.heatmaps import FORWARD_METHODS
from training.errors import HeatmapsAlike
from training.evaluate.heatmaps.faithfulness import STEPS, first_two
from training.evaluate.heatmaps.measures import CORRELATED, Measures, rounded
from training.evaluate.heatmaps.passes import LAST, SHARP_LAYER, Passes, by, explain
from training.evaluate.heatmaps.sensitivity import class_correlation, rank_correlation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract, Explanation
    from handlers.engines import Engine

Candidate: TypeAlias = tuple[str, str, str | None]
"""Method, layer and sharp layer."""

CANDIDATES: tuple[Candidate, ...] = (
    ("contrastcam", LAST, SHARP_LAYER),
    ("sharpcam", LAST, SHARP_LAYER),
    ("cam", LAST, None),
    ("gradcam++", LAST, None),
    ("layercam", LAST, None),
    ("gradcam", SHARP_LAYER, None),
    ("gradcam++", "layer2+layer3", None),
)
"""`cam` is Grad-CAM at the last layer; the last one is cifar10 0.8.0's default."""

AT_LEAST = {"quarter": 0.9, "quarter_peak": 0.95, "half": 0.9, "half_peak": 0.95}
"""Nine tenths of the heat belong to the class that was asked for; chance is 0.25 and 0.5."""

AT_MOST = {"class_correlation": 0.2, "random_head_correlation": 0.3}

MAX_RANDOMISED = 0.5
"""The largest rank correlation with heatmaps of any of the networks that are random from the head down."""

MAX_ALIKE = 0.5
"""The largest rank correlation of an image's heatmaps for its first and second class with which a version is packed."""


def choose_explanation(
    network: nn.Module,
    contract: Contract,
    engine: Engine,
    images: NDArray[np.float32],
    labels: NDArray[np.intp],
    *,
    among: Sequence[Candidate] = CANDIDATES,
    max_alike: float = MAX_ALIKE,
) -> tuple[Explanation, dict[str, Any]]:
    """Return the heatmaps' method and layers that do best on `images` (N, 3, H, W), and the report on all candidates.

    Args:
        network: full precision; what heatmaps are computed on.
        contract: the version's.
        engine: the version's; its confidence is what curves are made of.
        images: held-out images, normalised.
        labels: (N,) their classes.
        among: the candidates.
        max_alike: the largest rank correlation of the first two classes' heatmaps.

    Raises:
        HeatmapsAlike: no candidate's heatmaps depend on the class.
    """
    measures = Measures(network, contract, engine, images, labels)
    passes = Passes(network)
    rows = []
    for method, layer, sharp in tqdm(possible(network, among), desc="explanations", unit="candidate"):
        choice = replace(contract.explain, method=method, layer=layer, sharp_layer=sharp)
        figures = measures.of(by(choice, passes))
        found = {"method": method, "layer": layer, "sharp_layer": sharp, "admitted": is_admitted(figures)}
        rows.append(found | as_row(figures))
    best = best_of(rows, max_alike)
    if best["class_correlation"] > max_alike:
        shown = len(images[:CORRELATED])
        raise HeatmapsAlike(best["layer"], best["method"], best["class_correlation"], limit=max_alike, images=shown)
    chosen = {name: best[name] for name in ("method", "layer", "sharp_layer")}
    report: dict[str, Any] = {
        "schema": 2,
        "images": len(images),
        "steps": STEPS,
        "at_least": AT_LEAST,
        "at_most": AT_MOST | {"randomised": MAX_RANDOMISED},
        "absent": measures.absent,
        "chosen": chosen,
        "candidates": sorted(rows, key=lambda row: (not row["admitted"], -row["score"])),
        "random_heat": as_row(measures.of_random_heat()),
    }
    methods = tuple(dict.fromkeys((best["method"], *contract.explain.methods)))
    sharp = best["sharp_layer"] or contract.explain.sharp_layer  # callers may ask for the other forward methods
    return replace(contract.explain, **chosen | {"sharp_layer": sharp, "methods": methods}), report


def possible(network: nn.Module, among: Sequence[Candidate] = CANDIDATES) -> list[Candidate]:
    """Return the candidates that the network allows: class maps need a mean over places and one linear head."""
    has_maps = gives_evidence(network, SHARP_LAYER)
    return [row for row in among if has_maps or row[0] not in FORWARD_METHODS]


def is_admitted(figures: HeatmapFigures) -> bool:
    """Return True if the heatmaps are about the class and the weights; what could not be measured does not count."""
    values = asdict(figures)
    enough = all(values[name] is None or values[name] >= least for name, least in AT_LEAST.items())
    little = all(values[name] is None or values[name] <= most for name, most in AT_MOST.items())
    return enough and little and all(value <= MAX_RANDOMISED for _, value in figures.randomised)


def as_row(figures: HeatmapFigures) -> dict[str, Any]:
    """Return the figures as JSON-able data, and their `score`: insertion less deletion."""
    score = rounded((figures.insertion or 0) - (figures.deletion or 0))
    return {"score": score, **asdict(figures), "randomised": dict(figures.randomised)}


def figures_of(report: dict[str, Any]) -> tuple[HeatmapFigures, HeatmapFigures]:
    """Return the figures of the chosen heatmaps and of random heat in the report of `choose_explanation`."""
    chosen = next(row for row in report["candidates"] if report["chosen"].items() <= row.items())
    return _from_row(chosen), _from_row(report["random_heat"])


def _from_row(row: dict[str, Any]) -> HeatmapFigures:
    values = {field.name: row[field.name] for field in fields(HeatmapFigures)}
    return HeatmapFigures(**values | {"randomised": tuple(row["randomised"].items())})


def best_of(rows: list[dict[str, Any]], max_alike: float = MAX_ALIKE) -> dict[str, Any]:
    """Return the most faithful of the admitted candidates, by insertion less deletion and ROAD together.

    A network that has learnt little may have none: then it is the one that points best at the class, of those that
    depend on it; or the one that depends on it most. A method with a backward pass, which takes a worker of its own, is
    chosen only if there is no method of the forward pass among them: on few images small differences are chance.
    """
    if admitted := [row for row in rows if row["admitted"]]:
        return max(_cheapest(admitted), key=lambda row: row["score"] + row["road"])
    if about := [row for row in rows if row["class_correlation"] <= max_alike]:
        return max(_cheapest(about), key=lambda row: (row["quarter"] or 0) + (row["half"] or 0))
    return min(rows, key=lambda row: row["class_correlation"])


def _cheapest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the candidates of the forward pass; all of them if there is none."""
    return [row for row in rows if row["method"] in FORWARD_METHODS] or rows


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
    correlation = class_correlation(network, by(choice), images, *first_two(scores))
    if correlation > max_alike:
        raise HeatmapsAlike(choice.layer, choice.method, correlation, limit=max_alike, images=len(images))
    return correlation


def measure_explanation(
    network: nn.Module,
    contract: Contract,
    engine: Engine,
    images: NDArray[np.float32],
    labels: NDArray[np.intp],
) -> dict[str, Any]:
    """The report on the contract's own heatmaps, on `images` (N, 3, H, W) of the classes `labels` (N,).

    `random` is what pixels in random order reach, `stranger` what the heatmap of another image does;
    `stranger_similarity` is the rank correlation of heatmaps of different images, `random_heat` has all figures of
    random heat.
    """
    measures = Measures(network, contract, engine, images, labels)
    heatmaps = explain(network, contract.explain, images, measures.probe.targets)
    strangers = np.roll(heatmaps, 1, axis=0)
    return {
        "layer": contract.explain.layer,
        "method": contract.explain.method,
        "sharp_layer": contract.explain.sharp_layer if contract.explain.method in FORWARD_METHODS else None,
        "images": len(images),
        "steps": STEPS,
        "absent": measures.absent,
        **as_row(measures.of(by(contract.explain))),
        "random_heat": as_row(measures.of_random_heat()),
        "curves": asdict(measures.probe.measure(heatmaps)),
        "random": asdict(measures.probe.measure_random()),
        "stranger": asdict(measures.probe.measure(strangers)),
        "stranger_similarity": rounded(float(rank_correlation(heatmaps, strangers).mean())),
    }
