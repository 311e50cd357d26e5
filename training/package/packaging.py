"""Makes a trained run into a version: half-precision weights, fitted temperature, reference inputs, contract, archive.

Every choice is made on the images that the run held out; the test images are not looked at.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from contracts import model as model_contract
from contracts.model import Engine as EngineChoice
from contracts.model import Figures, Measured
from contracts.names import VERSION
from handlers.build import digest
from handlers.engines import OPENVINO_FILES, build_engine, predict_all, softmax
from handlers.engines.with_evidence import gives_evidence
from handlers.errors import EngineError
from handlers.evidence.heatmaps import FORWARD_METHODS
from handlers.preprocess import decode_for_network, normalise, prepare
from training.data.images import divide, encode_png, load_training_images
from training.errors import DataError, ExportError, ModelError
from training.evaluate.calibration import expected_calibration_error, fit_temperature
from training.evaluate.heatmaps.choice import (
    MAX_ALIKE,
    check_classes_differ,
    choose_explanation,
    figures_of,
)
from training.evaluate.heatmaps.measures import CORRELATED
from training.evaluate.heatmaps.passes import SHARP_LAYER
from training.evaluate.inference import predict_logits, run_engine
from training.package.artifacts import find_model, read_model
from training.package.engine_gate import GATE, MAX_DROP, GateRefused, add_engine, remove_engines
from training.package.evidence import FAMILIARITY, linear_head, write_evidence
from training.package.export import REFERENCE_IMAGES, REFUSED, package_directory, write_reference
from training.recipe import Recipe, recipe_from_dict
from training.tracking.releases import log_release
from training.tracking.store import warn_on_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Accepted, Contract, Explanation
    from handlers.engines import Engine
    from training.data.images import Images
    from training.package.engine_gate import GateReport

logger = logging.getLogger(__name__)

EXPLANATIONS = "explanations.json"

FORWARD_DEFAULT = "contrastcam"
"""The default method of a model for which held-out images have chosen none; docs/explanation/explanations.md."""

PRECISIONS = {"eager": ("fp32",), "openvino": tuple(OPENVINO_FILES)}
"""The precisions that a version can be packed in, by engine."""

# By how much a probability may be off on another machine: far above what other vector instructions and the order of
# operations change in each precision, far below what a wrong weight or transform changes.
TOLERANCES = {"fp32": 0.02, "bf16": 0.05, "int8": 0.1}


@dataclass(frozen=True)
class Package:
    """Result of `package`: the version's folder and its archive."""

    folder: Path
    archive: Path
    contract: Contract


def package(
    source: str,
    version: str,
    store: Path,
    folder: Path,
    cache: Path,
    *,
    precision: str = "fp32",
    engine: str | None = None,
    max_drop: float = MAX_DROP,
    explain_images: int = 0,
    max_alike: float = MAX_ALIKE,
    thumbnails: bool = True,
    sign: Callable[[Path], None] | None = None,
) -> Package:
    """Writes the version's files to `folder` and its archive to `store`.

    Args:
        source: what `find_model` takes.
        version: the version's name.
        store: TorchServe's model store.
        folder: gets `contract.json`, `weights.safetensors`, `reference.json` and the engine's files.
        cache: where the data set is kept.
        precision: `fp32`, `bf16` or `int8`.
        engine: `eager` (PyTorch, fp32 only) or `openvino` (with PyTorch as the fallback); None: `eager` for fp32, else
            `openvino`.
        max_drop: the loss of held-out accuracy, as a share, above which OpenVINO's engine is refused.
        explain_images: how many held-out images choose the heatmaps' layer and method; 0 keeps the model's.
        max_alike: the rank correlation of heatmaps for the first two classes above which the version is refused.
        thumbnails: whether the archive holds small copies of training images, to show similar ones.
        sign: called with the archive before it is registered; puts its signature beside it, as `<archive>.sig`.

    Raises:
        ModelError: there is no such model, or it does not say how it was trained.
        ExportError: the archive cannot be made, or not by that name.
        DataError: the held-out images cannot be had, or are others now.
        HeatmapsAlike: the heatmaps hardly depend on the class.
        GateRefused: the precision costs more accuracy than `max_drop`; the report is `gate-refused.json` in `folder`.
        EngineError: there is no such precision, or its engine cannot run here.
    """
    engine = choose_engine(engine, precision)
    if not VERSION.fullmatch(version):
        raise ExportError(f"{version!r} cannot be a version: use letters, digits, _ . + and -, as in 1.0.1")
    trained = find_model(source)
    contract, network = read_model(trained)
    if contract.accepted.recipe is None:
        raise ModelError(f"{source} does not say how it was trained (contract.json, accepted.recipe)")
    folder.mkdir(parents=True, exist_ok=True)
    # Beside what is there, which may be served: only a version that is whole and passed its gate takes its place.
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=folder) as scratch:
        try:
            contract = _write_version(
                network,
                replace(contract, version=version),
                Path(scratch),
                cache,
                precision=precision,
                engine_name=engine,
                max_drop=max_drop,
                explain_images=explain_images,
                max_alike=max_alike,
                thumbnails=thumbnails,
            )
        except GateRefused:
            (Path(scratch) / GATE).replace(folder / REFUSED)
            raise
        remove_engines(folder)
        for name in (EXPLANATIONS, FAMILIARITY, REFUSED):
            (folder / name).unlink(missing_ok=True)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)
    made = Package(folder, package_directory(folder, store), contract)
    if sign is not None:
        sign(made.archive)
    warn_on_failure(lambda: _register(made))
    return made


def choose_engine(name: str | None, precision: str) -> str:
    """Return the name of the engine that a version is packed for; without `name`, the precision's own.

    Raises:
        EngineError: no such engine is packed in this precision.
    """
    name = name or ("eager" if precision == "fp32" else "openvino")
    if name not in PRECISIONS:
        raise EngineError(f"there is no engine {name!r}: pass --engine {' or '.join(PRECISIONS)}")
    if precision not in PRECISIONS[name]:
        raise EngineError(
            f"the engine {name} is packed in {', '.join(PRECISIONS[name])}, not in {precision!r}: pass another "
            "--precision, or another --engine"
        )
    return name


def _write_version(
    network: nn.Module,
    contract: Contract,
    folder: Path,
    cache: Path,
    *,
    precision: str,
    engine_name: str,
    max_drop: float,
    explain_images: int,
    max_alike: float,
    thumbnails: bool,
) -> Contract:
    """Writes all of the version's files to the empty `folder` and returns its contract."""
    _save_half(network, folder / "weights.safetensors")
    contract = replace(contract, explain=_with_forward_methods(contract, network), evidence=None)
    training, held_out = _split_again(contract.accepted, cache)
    logits = predict_logits(network, held_out.images, contract.input).numpy()
    if not explain_images:  # refused before an engine is quantised, which takes minutes
        alike = _class_correlation(contract, network, held_out, logits, max_alike)
    eager = EngineChoice("eager", "fp32", fit_temperature(logits, held_out.labels))
    # All others are measured again: if a version is packed again, its old figures of engine and heatmaps do not hold.
    figures = Figures(
        validation_accuracy=contract.accepted.figures.validation_accuracy,
        held_out_images=len(held_out),
        held_out=_measured(logits, held_out.labels, eager.temperature),
        explainer_disagreement=0.0,  # one network answers and explains
    )
    engine, fallback = eager, None
    if engine_name != "eager":
        report = add_engine(
            network,
            contract,
            folder,
            choice=EngineChoice(engine_name, precision),
            training=training,
            held_out=held_out,
            logits=logits,
            max_drop=max_drop,
        )
        engine, fallback = report.engine, eager
        figures = _with_engine(figures, report)
    contract = replace(
        contract,
        engine=engine,
        fallback=fallback,
        accepted=replace(contract.accepted, figures=figures),
        schema=model_contract.SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if explain_images:
        contract = _choose_explanation(contract, network, folder, held_out.sample(explain_images), max_alike)
        alike = _class_correlation(contract, network, held_out, logits, max_alike)
    contract = _with_figures(contract, replace(contract.accepted.figures, explain_class_correlation=alike))
    contract = _add_evidence(contract, network, folder, training, held_out, thumbnails=thumbnails)
    model_contract.save(contract, folder / "contract.json")
    _write_reference(contract, network, folder, held_out)
    return contract


def _with_forward_methods(contract: Contract, network: nn.Module) -> Explanation:
    """Return the contract's heatmaps with the methods that `network` gives in the forward pass, first.

    One of them is the default unless held-out images once chose another.
    """
    explain = contract.explain
    sharp_layer = explain.sharp_layer or SHARP_LAYER
    if not gives_evidence(network, sharp_layer):
        return replace(explain, sharp_layer=None, forward=())
    was_chosen = contract.accepted.figures.explain_images > 0
    return replace(
        explain,
        method=explain.method if was_chosen else FORWARD_DEFAULT,
        methods=(*FORWARD_METHODS, *(method for method in explain.methods if method not in FORWARD_METHODS)),
        sharp_layer=sharp_layer,
        forward=FORWARD_METHODS,
    )


def _register(made: Package) -> None:
    """Logs archive, hash and gate report to the model version of the run that trained the model."""
    contract = made.contract
    accepted = contract.accepted
    if not accepted.run_id:
        logger.warning("MLflow was not there when this model was trained: %s is not registered", made.archive.name)
        return
    files = [made.folder / name for name in ("contract.json", "gate.json", "explanations.json")]
    files.append(made.archive.with_name(f"{made.archive.name}.sig"))
    release = log_release(
        contract.name,
        contract.version,
        accepted.run_id,
        made.archive,
        digest(made.archive),
        files=[path for path in files if path.is_file()],
        facts={
            "precision": contract.engine.precision,
            "held_out_accuracy": f"{accepted.figures.held_out.accuracy:.4f}" if accepted.figures.held_out else "",
        },
    )
    logger.info("registered as models:/%s/%s", release.name, release.number)


def _choose_explanation(
    contract: Contract, network: nn.Module, folder: Path, images: Images, max_alike: float
) -> Contract:
    """Return the contract with the layer and method that do best on `images`; writes `explanations.json`."""
    engine = build_engine(contract.engine, lambda: network, directory=folder, device=torch.device("cpu"))
    pixels = normalise(images.images, contract.input)
    choice, report = choose_explanation(network, contract, engine, pixels, images.labels, max_alike=max_alike)
    (folder / EXPLANATIONS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    chosen, random_heat = figures_of(report)
    figures = replace(
        contract.accepted.figures, explain_images=len(images), explanations=chosen, random_heat=random_heat
    )
    return _with_figures(replace(contract, explain=choice), figures)


def _add_evidence(
    contract: Contract, network: nn.Module, folder: Path, training: Images, held_out: Images, *, thumbnails: bool
) -> Contract:
    """Return the contract with the settings of `evidence.safetensors`, which is written to `folder`."""
    layer = contract.explain.sharp_layer
    engine = build_engine(contract.engine, lambda: network, directory=folder, device="cpu", sharp_layer=layer)

    def answer(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        return run_engine(engine, images, contract.input)

    evidence, areas = write_evidence(folder, answer, linear_head(network), training, held_out, thumbnails=thumbnails)
    figures = replace(contract.accepted.figures, familiarity=areas)
    return _with_figures(replace(contract, evidence=evidence), figures)


def _with_figures(contract: Contract, figures: Figures) -> Contract:
    return replace(contract, accepted=replace(contract.accepted, figures=figures))


def _split_again(accepted: Accepted, cache: Path) -> tuple[Images, Images]:
    """Return the images that the accepted model learnt from, and those that its training held out."""
    sha256 = None if accepted.provenance is None else accepted.provenance.data_sha256
    return split_images(recipe_from_dict(accepted.recipe or {}), cache, sha256=sha256)


def _class_correlation(
    contract: Contract, network: nn.Module, held_out: Images, logits: NDArray[np.float32], max_alike: float
) -> float:
    shown = held_out.sample_indices(CORRELATED)
    pixels = normalise(held_out.images[shown], contract.input)
    return round(check_classes_differ(network, contract.explain, pixels, logits[shown], max_alike), 4)


def split_images(recipe: Recipe, cache: Path, *, sha256: str | None = None) -> tuple[Images, Images]:
    """The images that a training by `recipe` learnt from, and those held out, which decide all about its model.

    Raises:
        DataError: they cannot be had, or are not those with the hash `sha256`: after another division,
            most would be training images.
    """
    images, _ = load_training_images(recipe.data, cache)
    if sha256 is not None and images.sha256() != sha256:
        raise DataError(
            f"the images of {recipe.data} are not those that the model was trained with, what was held out is lost: "
            "bring them back, or train again"
        )
    return divide(images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed)


def _measured(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float) -> Measured:
    before, after = softmax(logits, 1.0), softmax(logits, temperature)
    return Measured(
        accuracy=float((after.argmax(axis=1) == labels).mean()),
        calibration_error_before=expected_calibration_error(before, labels),
        calibration_error=expected_calibration_error(after, labels),
    )


def _with_engine(figures: Figures, report: GateReport) -> Figures:
    """Return the figures with what the serving engine did on the held-out images."""
    measured = report.measured
    return replace(
        figures,
        served=Measured(measured.accuracy, measured.calibration_error_before, measured.calibration_error),
        engine_agreement=report.agreement,
        engine_heatmap_correlation=report.heatmap_correlation,
        # Heatmaps are the full-precision network's, which may hold the image for something else than was answered.
        explainer_disagreement=round(1 - report.agreement, 6),
    )


def _save_half(network: nn.Module, path: Path) -> None:
    """Rounds the network's weights to half precision, in place, and saves them: what is measured is what is kept."""
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_file(state, path)
    path.chmod(0o644)  # safetensors writes for its owner alone
    network.load_state_dict(state)


def _write_reference(contract: Contract, network: nn.Module, folder: Path, held_out: Images) -> None:
    """Writes `reference.json` with the answers of the contract's engine and of its fallback."""

    def answers(choice: EngineChoice) -> tuple[Callable[[Sequence[bytes]], NDArray[np.float32]], float]:
        engine = build_engine(choice, lambda: network, directory=folder, device=torch.device("cpu"))
        return lambda encoded: _predict(engine, contract, encoded), TOLERANCES[choice.precision]

    predict, tolerance = answers(contract.engine)
    write_reference(
        folder / "reference.json",
        # Of all classes: a folder's images stand in their order. Repeated where a small data set holds fewer out.
        [
            encode_png(held_out.images[index])
            for index in np.linspace(0, len(held_out) - 1, REFERENCE_IMAGES).astype(int)
        ],
        predict,
        tolerance=tolerance,
        fallback=answers(contract.fallback) if contract.fallback else None,
    )


def _predict(engine: Engine, contract: Contract, encoded: Sequence[bytes]) -> NDArray[np.float32]:
    pixels = np.stack([prepare(decode_for_network(image, contract.input).image, contract.input) for image in encoded])
    return predict_all(engine, normalise(pixels, contract.input))
