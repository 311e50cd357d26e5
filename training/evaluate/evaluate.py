"""Measures a model on the test images, with the engine that serves it: figures, explanations, images, model card."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mlflow.entities import Metric
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from handlers.engines import build_engine, softmax
from handlers.preprocess import normalise
from training.data.images import divide, has_test_part, load_test_images, load_training_images
from training.errors import ModelError
from training.evaluate.calibration import expected_calibration_error, reliability
from training.evaluate.card import write_card
from training.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from training.evaluate.evidence import MeasuredEvidence, measure_familiar
from training.evaluate.figures import (
    SAMPLES,
    Sample,
    draw_samples,
    plot_calibration,
    plot_confusion,
    plot_explanation,
)
from training.evaluate.heatmaps.choice import AT_LEAST, AT_MOST, measure_explanation
from training.evaluate.heatmaps.passes import explain
from training.evaluate.inference import run_engine
from training.evaluate.test_set_log import record_look
from training.package.artifacts import find_model, read_model, weights_sha256
from training.recipe import recipe_from_dict
from training.tracking.recorder import dataset_input
from training.tracking.store import connect, environment, warn_on_failure

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract
    from handlers.engines import Engine
    from training.data.images import Images

logger = logging.getLogger(__name__)

EXPLAINED_IMAGES = 200
FILES = ("metrics.json", "confusion.png", "calibration.png", "samples.png", "explanations.json", "explanations.png")
"""Files that an evaluation writes; the last two only if explanations are measured."""

TEST, HELD_OUT, TRAINING = "test", "held-out", "training"
"""The parts of a data set that can be measured on: reported only; made the model's choices; learnt from."""


@dataclass(frozen=True)
class Figures:
    """Figures of a model on labelled images; rates are shares between 0 and 1.

    `confusion` counts images: row = true class, column = answered class.
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


def evaluate(
    source: str,
    data: str | None,
    cache: Path,
    output: Path,
    *,
    looks: Path,
    card: Path | None = None,
    explained: int = EXPLAINED_IMAGES,
    corrupted: int = 0,
) -> dict[str, Any]:
    """Measures the model `source` on the test images of `data`, and its explanations on some of them.

    Of a data set without a test part that the model learnt from, the images that its training held out are taken.

    Args:
        source: what `find_model` takes.
        data: what `load_training_images` takes; None takes what the model learnt from.
        cache: where the data set is kept.
        output: folder of `metrics.json`, `explanations.json` and the images.
        looks: gets a line about this look at the test images.
        card: where to write a model card with the figures, if anywhere.
        explained: how many images to measure explanations on; 0 leaves them out.
        corrupted: how many images to corrupt, each in 75 ways; 0 leaves that out.

    Returns:
        The report as in `metrics.json`, and under `explanation` that of `explanations.json`.

    Raises:
        ModelError: there is no such model, or the data has other classes.
        DataError: the data cannot be had.
    """
    started = time.perf_counter()
    folder = find_model(source)
    contract, network = read_model(folder)
    data = data or (contract.accepted.recipe or {}).get("data", "cifar10")
    for written in (output, *([card.parent] if card else [])):
        _make_folder(written)
    images, part = _choose_images(contract, data, cache)
    if images.classes != contract.classes:
        raise ModelError(
            f"the model answers {', '.join(contract.classes)}; {data} has {', '.join(images.classes)}: "
            "pass --data with images of the model's classes"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = contract.explain.sharp_layer
    engine = build_engine(contract.engine, lambda: network, directory=folder, device=device, sharp_layer=layer)
    evidence = MeasuredEvidence(folder, contract)
    probabilities, features = run_engine(engine, images.images, contract.input)
    identity = _identity(folder, contract, images, data, part)
    if part == TRAINING:
        logger.warning("the model learnt from these very images: what it makes of them says nothing about others")
    report = identity | _figures(probabilities, images.labels, contract)
    report |= _measure_evidence(evidence, probabilities, features, images.labels)
    record_look(
        looks,
        "gradserve evaluate",
        model=f"{contract.name} {contract.version}",
        weights_sha256=identity["model"]["weights_sha256"],
        engine=f"{contract.engine.name} {contract.engine.precision}",
        commit=identity["environment"]["git_commit"],
        data=identity["data"]["name"],
        part=part,
        images=len(images),
        accuracy=report["accuracy"],
    )
    plot_confusion(report["confusion"], contract.classes, output / "confusion.png")
    _draw(probabilities, images, contract, network.to(device), output)
    explanation = _measure_explanation(network, contract, engine, images, explained) if explained else {}
    if corrupted:
        report["corrupted"] = measure_corrupted(engine, images.sample(corrupted), contract, evidence)
    report["seconds"] = round(time.perf_counter() - started, 1)
    _write(output / "metrics.json", report)
    if explanation:
        plot_explanation(explanation, output / "explanations.png")
        _write(output / "explanations.json", identity | {"explanation": explanation})
        report["explanation"] = explanation
    if card is not None:
        card.write_text(write_card(contract, report), encoding="utf-8")
    if identity["model"]["run_id"]:
        _log(report, images, data, output)
    return report


def _measure_evidence(
    evidence: MeasuredEvidence,
    probabilities: NDArray[np.float32],
    features: NDArray[np.float32] | None,
    labels: NDArray[np.int64],
) -> dict[str, Any]:
    """Return the figures of familiarity and answer sets, of those that the version has."""
    figures: dict[str, Any] = {}
    familiar = evidence.familiar(probabilities, features)
    if familiar is not None:
        figures["familiarity"] = measure_familiar(familiar, probabilities.argmax(axis=1) == labels)
    if sets := evidence.measure_sets(probabilities, labels):
        figures["answer_sets"] = sets
    return figures


def measure_corrupted(engine: Engine, images: Images, contract: Contract, evidence: MeasuredEvidence) -> dict[str, Any]:
    """Return figures on `images` corrupted in 15 kinds and five severities: mean, by severity, and by kind.

    Each kind has `severities`, five objects of accuracy, calibration error and, if the version can tell, the share of
    `familiar` images. The answer sets' figures are those on all corrupted images together.
    """
    kinds: dict[str, dict[str, Any]] = {}
    answers = []
    for kind in CORRUPTIONS:
        found = []
        for severity in SEVERITIES:
            pixels = corrupt(images.images, kind, severity)
            probabilities, features = run_engine(engine, pixels, contract.input)
            answers.append(probabilities)
            found.append(_robustness(evidence, probabilities, features, images.labels))
        kinds[kind] = _means(found) | {"severities": found}
        logger.info("%s: accuracy %.3f", kind, kinds[kind]["accuracy"])
    by_severity = [_means([row["severities"][place] for row in kinds.values()]) for place in range(len(SEVERITIES))]
    report = {"images": len(images), **_means(by_severity), "severities": by_severity, "kinds": kinds}
    if sets := evidence.measure_sets(np.concatenate(answers), np.tile(images.labels, len(answers))):
        report["answer_sets"] = sets
    return report


def _robustness(
    evidence: MeasuredEvidence,
    probabilities: NDArray[np.float32],
    features: NDArray[np.float32] | None,
    labels: NDArray[np.int64],
) -> dict[str, float]:
    row = {
        "accuracy": round(float((probabilities.argmax(axis=1) == labels).mean()), 4),
        "expected_calibration_error": round(expected_calibration_error(probabilities, labels), 4),
    }
    familiar = evidence.familiar(probabilities, features)
    return row if familiar is None else row | {"familiar": round(float(familiar.mean()), 4)}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means of the numbers in `rows`, by name."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}


def _choose_images(contract: Contract, data: str, cache: Path) -> tuple[Images, str]:
    """Return the images to measure on and which part of the data they are.

    Where the model learnt from `data` and that has no test part, it is what the training held out.
    """
    recipe = recipe_from_dict(contract.accepted.recipe or {})
    provenance = contract.accepted.provenance
    if provenance is not None and data == recipe.data and not has_test_part(data):
        images, _ = load_training_images(data, cache)
        # After another division, training images would be called held out.
        if images.sha256() == provenance.data_sha256:
            held_out = divide(images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed)[1]
            return held_out, HELD_OUT
    images = load_test_images(data, cache, contract.input)
    digest = images.sha256()
    # By name too: a folder to which images were added since is still mostly what was learnt.
    is_learnt = any(
        (accepted.provenance is not None and digest == accepted.provenance.data_sha256)
        or (data == (accepted.recipe or {}).get("data") and not has_test_part(data))
        for accepted in contract.accepted.lineage()
    )
    return images, TRAINING if is_learnt else TEST


def _identity(folder: Path, contract: Contract, images: Images, data: str, part: str) -> dict[str, Any]:
    """Return the figures' subject: model, data and environment."""
    return {
        "model": {
            "name": contract.name,
            "version": contract.version,
            "weights_sha256": weights_sha256(folder),
            "run_id": contract.accepted.run_id,
            "engine": asdict(contract.engine),
        },
        "data": {
            "name": data.partition(":")[0],
            "part": part,
            "images": len(images),
            "sha256": images.sha256(),
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }


def _figures(probabilities: NDArray[np.float32], labels: NDArray[np.int64], contract: Contract) -> dict[str, Any]:
    figures = measure(probabilities, labels, contract.classes)
    before = expected_calibration_error(_without_temperature(probabilities, contract), labels)
    return {**asdict(figures), "expected_calibration_error_before": before}


def _without_temperature(probabilities: NDArray[np.float32], contract: Contract) -> NDArray[np.float32]:
    """The probabilities that the engine would give at temperature 1."""
    logits = np.log(
        np.maximum(probabilities, np.finfo(np.float32).tiny)
    )  # up to a constant, divided by the temperature
    return softmax(logits, 1 / contract.engine.temperature)


def _measure_explanation(
    network: nn.Module, contract: Contract, engine: Engine, images: Images, count: int
) -> dict[str, Any]:
    shown = images.sample(count)
    logger.info("measuring heatmaps on %d images, which takes minutes on a few cores", len(shown))
    pixels = normalise(shown.images, contract.input)
    return measure_explanation(network, contract, engine, pixels, shown.labels)


def _draw(
    probabilities: NDArray[np.float32], images: Images, contract: Contract, network: nn.Module, output: Path
) -> None:
    """Draws `calibration.png`, and `samples.png` of right answers and wrong ones."""
    answers = probabilities.argmax(axis=1)
    right = answers == images.labels
    plot_calibration(
        {
            "temperature 1": reliability(_without_temperature(probabilities, contract), images.labels),
            f"temperature {contract.engine.temperature}": reliability(probabilities, images.labels),
        },
        output / "calibration.png",
    )
    rows = []
    for found in (np.flatnonzero(right), np.flatnonzero(~right)):
        chosen = np.random.default_rng(0).permutation(found)[:SAMPLES]
        if not len(chosen):
            continue
        pixels = images.images[chosen]
        heatmaps = explain(network, contract.explain, normalise(pixels, contract.input), answers[chosen])
        captions = [_caption(index, probabilities, images, contract) for index in chosen]
        rows.append([Sample(*sample) for sample in zip(pixels, heatmaps, captions, strict=True)])
    draw_samples(rows, output / "samples.png")


def _caption(index: int, probabilities: NDArray[np.float32], images: Images, contract: Contract) -> str:
    answer, label = int(probabilities[index].argmax()), int(images.labels[index])
    said = f"{contract.classes[answer]} {probabilities[index, answer]:.0%}"
    return said if answer == label else f"{said}\nis: {contract.classes[label]}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder} cannot be a folder for what is written ({error.strerror}): name another") from error


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _log(report: dict[str, Any], images: Images, data: str, output: Path) -> None:
    """Attaches figures and images to the run of the model, and to its registered version where there is one."""
    prefix = report["data"]["part"].replace("-", "_")
    metrics = {f"{prefix}_{name}": value for name, value in report["macro"].items()}
    for name in ("accuracy", "expected_calibration_error", "expected_calibration_error_before"):
        metrics[f"{prefix}_{name}"] = report[name]
    if "explanation" in report:
        for name in ("score", "deletion", "insertion", "road", *AT_LEAST, *AT_MOST):
            if report["explanation"][name] is not None:
                metrics[f"{prefix}_explanation_{name}"] = report["explanation"][name]
    if "corrupted" in report:
        for name in ("accuracy", "expected_calibration_error"):
            metrics[f"{prefix}_corrupted_{name}"] = report["corrupted"][name]
    files = [output / name for name in (FILES if "explanation" in report else FILES[:-2])]
    if warn_on_failure(lambda: _attach(report, images, data, metrics)):
        warn_on_failure(lambda: _attach_files(report["model"]["run_id"], files))


def _attach_files(run_id: str, files: list[Path]) -> None:
    client = connect()
    for path in files:
        client.log_artifact(run_id, str(path), "evaluation")


def _attach(report: dict[str, Any], images: Images, data: str, metrics: dict[str, float]) -> None:
    """Logs `metrics` as the registered version's own, with the data they were measured on, and tags the version."""
    model = report["model"]
    client = connect()
    measured_on = dataset_input(report["data"]["part"], images, data)
    run = client.get_run(model["run_id"])
    known = {found.dataset.digest for found in run.inputs.dataset_inputs} if run.inputs else set()
    if measured_on.dataset.digest not in known:  # MLflow would list it once more
        client.log_inputs(model["run_id"], datasets=[measured_on])
    versions = sorted(
        client.search_model_versions(f"run_id = '{model['run_id']}'"), key=lambda found: int(found.version)
    )
    # One run may have become several releases: this one's, or else the version that the training registered.
    released = [found for found in versions if found.tags.get("release") == model["version"]]
    version = next(iter(released or versions), None)
    logged = run.outputs.model_outputs if run.outputs else []  # the registry keeps no model's id
    now = int(time.time() * 1000)
    entries = [
        Metric(
            name,
            value,
            now,
            0,
            model_id=logged[0].model_id if logged else None,
            dataset_name=measured_on.dataset.name,
            dataset_digest=measured_on.dataset.digest,
        )
        for name, value in metrics.items()
    ]
    client.log_batch(model["run_id"], metrics=entries)
    if version:
        tags = {name: f"{value:.4f}" for name, value in metrics.items()}
        prefix = report["data"]["part"].replace("-", "_")
        tags |= {
            f"{prefix}_engine": f"{model['engine']['name']} {model['engine']['precision']}",
            f"{prefix}_weights_sha256": model["weights_sha256"],
            f"{prefix}_data_sha256": report["data"]["sha256"],
        }
        for name, value in tags.items():
            client.set_model_version_tag(version.name, version.version, name, value)
