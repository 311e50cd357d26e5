"""Measures a model on the test images, with the engine that serves it, and writes `metrics.json`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from handlers.engines import build_engine, predict_all
from handlers.preprocess import normalise
from training.artifacts import find_model, read_model, weights_sha256
from training.card import write_card
from training.data import load_test_images
from training.errors import ModelError
from training.tracking import Tracker, environment

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CALIBRATION_BINS = 15  # Source: Guo et al. 2017, section 2, https://arxiv.org/abs/1706.04599


@dataclass(frozen=True)
class Figures:
    """What a model reached on labelled images; rates are shares between 0 and 1.

    `confusion` counts pictures: row = true class, column = answered class.
    """

    accuracy: float
    macro: dict[str, float]
    per_class: dict[str, dict[str, float]]
    confusion: list[list[int]]
    expected_calibration_error: float


def measure(probabilities: NDArray[np.float32], labels: NDArray[np.int64], classes: tuple[str, ...]) -> Figures:
    """The figures of `probabilities` (N, K) for the true `labels` (N,); a class never answered has precision 0."""
    answers = probabilities.argmax(axis=1)
    indices = list(range(len(classes)))
    columns = ("precision", "recall", "f1", "support")
    by_class = precision_recall_fscore_support(labels, answers, labels=indices, zero_division=0)
    macro = precision_recall_fscore_support(labels, answers, labels=indices, average="macro", zero_division=0)
    return Figures(
        accuracy=float((answers == labels).mean()),
        macro={name: float(value) for name, value in zip(columns[:3], macro[:3], strict=True)},
        per_class={
            name: {column: float(values[index]) for column, values in zip(columns, by_class, strict=True)}
            for index, name in enumerate(classes)
        },
        confusion=confusion_matrix(labels, answers, labels=indices).tolist(),
        expected_calibration_error=expected_calibration_error(probabilities, labels),
    )


def expected_calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean gap between confidence and accuracy of the top class over 15 equal-width bins, weighted by their size.

    `Σ_b |B_b|/N · |accuracy(B_b) - confidence(B_b)|`. Source: Guo et al. 2017, equation 3,
    https://arxiv.org/abs/1706.04599
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def evaluate(source: str, data: str, cache: Path, output: Path, *, card: Path | None = None) -> dict[str, Any]:
    """Measures the model `source` on the test images of `data`; writes `metrics.json` and `confusion.png` to `output`.

    Args:
        source: what `find_model` takes.
        data: what `load_training_images` takes.
        cache: where the data set is kept.
        output: folder of the results.
        card: where to write a model card with the figures, if anywhere.

    Returns:
        The report as written.

    Raises:
        ModelError: there is no such model, or the data has other classes.
        DataError: the data cannot be had.
    """
    folder = find_model(source)
    contract, network = read_model(folder)
    images = load_test_images(data, cache, contract.input)
    if images.classes != contract.classes:
        raise ModelError(f"the model answers {', '.join(contract.classes)}; the data has {', '.join(images.classes)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = build_engine(contract.engine, network, directory=folder, device=device)
    started = time.perf_counter()
    parts = [
        predict_all(engine, normalise(images.images[start : start + 1000], contract.input))
        for start in range(0, len(images), 1000)
    ]
    figures = measure(np.concatenate(parts), images.labels, contract.classes)
    report = {
        "model": {
            "name": contract.name,
            "version": contract.version,
            "weights_sha256": weights_sha256(folder),
            "run_id": contract.accepted.get("run_id", ""),
            "engine": asdict(contract.engine),
        },
        "data": {"name": data.partition(":")[0], "part": "test", "images": len(images), "sha256": images.sha256()},
        **asdict(figures),
        "seconds": round(time.perf_counter() - started, 1),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_confusion(figures.confusion, contract.classes, output / "confusion.png")
    if card is not None:
        card.write_text(write_card(contract, report), encoding="utf-8")
    if report["model"]["run_id"]:
        _log(report, output)
    return report


def plot_confusion(confusion: list[list[int]], classes: tuple[str, ...], path: Path) -> None:
    """Draws the confusion matrix into the PNG `path`; colours are shares of the true class."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.62 * len(classes) + 1.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120)


def _log(report: dict[str, Any], output: Path) -> None:
    tracker = Tracker("evaluation", report["model"]["run_id"])
    metrics = {f"test_{name}": value for name, value in report["macro"].items()}
    metrics |= {
        "test_accuracy": report["accuracy"],
        "test_expected_calibration_error": report["expected_calibration_error"],
    }
    tracker.metrics(metrics, step=0)
    for name in ("metrics.json", "confusion.png"):
        tracker.artifact(output / name, "evaluation")
    tracker.finish()
