"""Writes a version's engine files and decides whether they may be used; knows no engine but by its name.

The gate compares the engine with the full-precision network on the held-out images. It refuses the engine when accuracy
falls by more than a bound, or when its heatmaps are others. What it saw is written to `gate.json`, which travels with
the archive.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch

from contracts.model import Engine
from handlers.engines import OPENVINO_FILES, build_engine, predict_all, run_all, softmax
from handlers.errors import EngineError
from handlers.evidence.heatmaps import FORWARD_METHODS, heatmap
from handlers.preprocess import normalise
from training.errors import ModelError
from training.evaluate.calibration import expected_calibration_error, fit_temperature
from training.evaluate.heatmaps.sensitivity import rank_correlation
from training.package.quantise import write_openvino

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract
    from handlers.engines import Engine as RunningEngine
    from training.data.images import Images

MAX_DROP = 0.003
"""The largest loss of held-out accuracy, as a share: 0.3 points."""

MIN_HEATMAP_CORRELATION = 0.95
"""The smallest median rank correlation of the engine's heatmaps with full precision's."""

HEATMAP_IMAGES = 200

GATE = "gate.json"


class GateRefused(ModelError):
    """The engine loses more accuracy, or changes heatmaps more, than allowed; the report is written all the same."""

    def __init__(self, report: GateReport) -> None:
        engine = f"{report.engine.name} {report.engine.precision}"
        if report.drop <= report.max_drop:
            super().__init__(
                f"the heatmaps of {engine} have a median rank correlation of {report.heatmap_correlation} with those "
                f"of full precision, less than {MIN_HEATMAP_CORRELATION}: package with another precision"
            )
            return
        super().__init__(
            f"{engine} loses {report.drop * 100:.2f} points of held-out accuracy "
            f"({report.reference.accuracy:.2%} to {report.measured.accuracy:.2%}), more than "
            f"{report.max_drop * 100:.2f}: package with another precision, or raise the bound knowingly"
        )


@dataclass(frozen=True)
class Measured:
    """Figures of an engine on the held-out images; shares between 0 and 1."""

    accuracy: float
    calibration_error_before: float
    calibration_error: float
    temperature: float


@dataclass(frozen=True)
class GateReport:
    """The comparison of an engine with the full-precision network on the held-out images.

    `agreement` is the share of images on which both give the same class, over all and by the class of full precision.
    `heatmap_correlation` is the median rank correlation of their heatmaps, for the method of the forward pass that
    agrees least; None if the engine makes none.
    """

    engine: Engine
    held_out_images: int
    calibration_images: int
    reference: Measured
    measured: Measured
    agreement: float
    agreement_by_class: dict[str, float | None]
    drop: float
    max_drop: float
    versions: dict[str, str]
    heatmap_correlation: float | None = None

    @property
    def passed(self) -> bool:
        """Return True if the engine may be used."""
        alike = self.heatmap_correlation
        return self.drop <= self.max_drop and (alike is None or alike >= MIN_HEATMAP_CORRELATION)


def add_engine(
    network: nn.Module,
    contract: Contract,
    folder: Path,
    *,
    choice: Engine,
    training: Images,
    held_out: Images,
    logits: NDArray[np.float32],
    max_drop: float = MAX_DROP,
) -> GateReport:
    """Write the files of the engine `choice` and the gate's report to `folder`.

    Args:
        network: full precision, with the weights that the version keeps.
        contract: the version's; its engine is not looked at. With `explain.sharp_layer`, the engine makes heatmaps.
        folder: the version's.
        choice: the engine's name and precision; its temperature is fitted here.
        training: images to calibrate integers with.
        held_out: images that decide.
        logits: (N, K), the network's own for `held_out`.
        max_drop: the largest loss of accuracy, as a share.

    Returns:
        The report; its `engine` is the contract's, temperature included.

    Raises:
        GateRefused: the loss is larger, or the heatmaps differ.
        EngineError: no such engine has files, or it cannot run here.
    """
    network = network.to("cpu").eval()
    calibration_images = _write_files(choice, network, contract, folder, training)
    other = _log_probabilities(replace(choice, temperature=1.0), contract, folder, held_out)
    report = _compare(logits, other, held_out, choice, calibration_images=calibration_images, max_drop=max_drop)
    sharp_layer = contract.explain.sharp_layer
    if sharp_layer is not None:
        whole, served = (
            build_engine(engine, lambda: network, directory=folder, device="cpu", sharp_layer=sharp_layer)
            for engine in (Engine(), report.engine)
        )
        images = normalise(held_out.sample(HEATMAP_IMAGES).images, contract.input)
        report = replace(report, heatmap_correlation=_compare_heatmaps(whole, served, images))
    text = json.dumps({"schema": 1, "passed": report.passed, **asdict(report)}, indent=2)
    (folder / GATE).write_text(text + "\n", encoding="utf-8")
    if not report.passed:
        raise GateRefused(report)
    return report


def _write_files(choice: Engine, network: nn.Module, contract: Contract, folder: Path, training: Images) -> int:
    """Write the engine's files to `folder` and return how many training images calibrated it."""
    if choice.name == "openvino":
        return write_openvino(network, contract, folder, precision=choice.precision, training=training)
    raise EngineError(f"the engine {choice.name!r} has no files of its own: pass --engine openvino")


def _compare(
    whole: NDArray[np.float32],
    other: NDArray[np.float32],
    held_out: Images,
    choice: Engine,
    *,
    calibration_images: int,
    max_drop: float,
) -> GateReport:
    """Return the report on `other` logits (N, K) against those of full precision."""
    reference, measured = _measure(whole, held_out.labels), _measure(other, held_out.labels)
    answers = whole.argmax(axis=1)
    same = answers == other.argmax(axis=1)
    by_class = {
        name: float(same[answers == index].mean()) if (answers == index).any() else None
        for index, name in enumerate(held_out.classes)
    }
    return GateReport(
        engine=replace(choice, temperature=measured.temperature),
        held_out_images=len(held_out),
        calibration_images=calibration_images,
        reference=reference,
        measured=measured,
        agreement=float(same.mean()),
        agreement_by_class=by_class,
        drop=reference.accuracy - measured.accuracy,
        max_drop=max_drop,
        versions={name: version(name) for name in ("openvino", "nncf", "torch")},
    )


def _compare_heatmaps(whole: RunningEngine, other: RunningEngine, images: NDArray[np.float32]) -> float:
    """Return the median rank correlation of two engines' heatmaps for the classes of `whole`, by the worst method."""
    expected, found = run_all(whole, images), run_all(other, images)
    targets = expected.probabilities.argmax(axis=1)
    size = (images.shape[2], images.shape[3])
    medians = [
        np.median(rank_correlation(*(heatmap(outputs, targets, method, size)[0] for outputs in (expected, found))))
        for method in FORWARD_METHODS
    ]
    return round(float(min(medians)), 4)


def remove_engines(folder: Path) -> None:
    """Remove what `add_engine` once wrote to `folder`, so that no archive carries another version's engine."""
    for name in {*OPENVINO_FILES.values()}:
        (folder / name).unlink(missing_ok=True)
        (folder / name).with_suffix(".bin").unlink(missing_ok=True)
    (folder / GATE).unlink(missing_ok=True)


def _log_probabilities(choice: Engine, contract: Contract, folder: Path, images: Images) -> NDArray[np.float32]:
    """Logits up to a constant per image, which no softmax sees, (N, K)."""
    engine = build_engine(choice, None, directory=folder, device=torch.device("cpu"))
    parts = [
        predict_all(engine, normalise(images.images[start : start + 512], contract.input))
        for start in range(0, len(images), 512)
    ]
    logs: NDArray[np.float32] = np.log(np.maximum(np.concatenate(parts), np.finfo(np.float32).tiny))
    return logs


def _measure(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Measured:
    temperature = fit_temperature(logits, labels)
    return Measured(
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        calibration_error_before=expected_calibration_error(softmax(logits, 1.0), labels),
        calibration_error=expected_calibration_error(softmax(logits, temperature), labels),
        temperature=temperature,
    )
