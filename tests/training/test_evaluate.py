import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from handlers.engines import softmax
from training.calibration import fit_temperature
from training.errors import ModelError
from training.evaluate import evaluate, expected_calibration_error, measure
from training.recipe import Augmentation, Recipe
from training.release import package
from training.train import train

SAMPLES = Path(__file__).parents[1] / "samples"
DATA = f"imagefolder:{SAMPLES}"


def one_hot(answers: list[int], confidence: float = 1.0, classes: int = 3) -> np.ndarray:
    rest = (1 - confidence) / (classes - 1)
    probabilities = np.full((len(answers), classes), rest, np.float32)
    probabilities[np.arange(len(answers)), answers] = confidence
    return probabilities


def test_figures_of_a_case_counted_by_hand():
    """True cat, cat, dog, dog, dog; answered cat, dog, dog, dog, cat; nobody answers fox."""
    figures = measure(one_hot([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 1]), ("cat", "dog", "fox"))
    assert figures.accuracy == pytest.approx(3 / 5)
    assert figures.confusion == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert figures.per_class["cat"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2})
    assert figures.per_class["dog"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert figures.per_class["fox"]["precision"] == 0
    assert figures.macro["f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    labels = np.array([0, 0, 0, 1])
    assert expected_calibration_error(one_hot([0, 0, 0, 0], confidence=0.9), labels) == pytest.approx(0.15, abs=1e-6)
    assert expected_calibration_error(one_hot([0, 0, 0, 1]), labels) == 0


def test_calibration_error_weighs_bins_by_their_pictures():
    """One of 10 pictures is answered with 1.0 and wrongly, the rest with 1.0 and rightly."""
    assert expected_calibration_error(one_hot([0] * 10), np.array([1] + [0] * 9)) == pytest.approx(0.1)


def test_fitted_temperature_undoes_overconfidence():
    random = np.random.default_rng(0)
    logits = random.normal(size=(5000, 5)).astype(np.float32)
    drawn = np.array(
        [random.choice(5, p=row.astype(np.float64) / row.sum(dtype=np.float64)) for row in softmax(logits, 1.0)]
    )
    assert fit_temperature(logits * 3, drawn) == pytest.approx(3, rel=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache) -> Path:
    recipe = Recipe(
        data=DATA, epochs=1, batch_size=16, sizes=((0.0, 8),), workers=0, validation=0.4, augmentation=Augmentation(0)
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "run", cache, registers=False)


def test_report_names_model_data_and_versions(run, tmp_path, cache):
    report = evaluate(str(run), DATA, cache, tmp_path, card=tmp_path / "card.md")
    assert json.loads((tmp_path / "metrics.json").read_text()) == report
    assert report["data"]["images"] == 100
    assert len(report["data"]["sha256"]) == len(report["model"]["weights_sha256"]) == 64
    assert np.trace(report["confusion"]) == pytest.approx(100 * report["accuracy"])
    assert "version_torch" in report["environment"]
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert f"accuracy **{report['accuracy']:.2%}**" in (tmp_path / "card.md").read_text()


def test_run_is_evaluated_from_mlflow_as_from_its_folder(run, tmp_path, cache):
    run_id = json.loads((run / "contract.json").read_text())["accepted"]["run_id"]
    from_folder = evaluate(str(run), DATA, cache, tmp_path / "folder")
    from_mlflow = evaluate(f"runs:/{run_id}", DATA, cache, tmp_path / "mlflow")
    assert from_folder["confusion"] == from_mlflow["confusion"]
    assert from_folder["model"]["weights_sha256"] == from_mlflow["model"]["weights_sha256"]


def test_missing_model_says_how_to_make_one(tmp_path, cache):
    with pytest.raises(ModelError, match="gradserve train"):
        evaluate(str(tmp_path), DATA, cache, tmp_path)


def test_package_keeps_what_it_measured(run, tmp_path, cache):
    made = package(str(run), "1.2.3", tmp_path / "store", tmp_path / "files", cache)
    assert made.archive.name == "cifar10-1.2.3.mar"
    assert made.contract.accepted["held_out_images"] == 40
    assert made.contract.engine.temperature > 0
    report = evaluate(str(tmp_path / "files"), DATA, cache, tmp_path / "results")
    assert report["model"]["version"] == "1.2.3"


def test_a_quantised_package_carries_its_gate_report_and_its_fallback(run, tmp_path, cache):
    made = package(str(run), "1.2.4", tmp_path / "store", tmp_path / "files", cache, precision="int8", max_drop=1.0)
    assert (made.contract.engine.name, made.contract.engine.precision) == ("openvino", "int8")
    assert made.contract.fallback.name == "eager"
    members = zipfile.ZipFile(made.archive).namelist()
    assert {"openvino-int8.xml", "openvino-int8.bin", "gate.json", "weights.safetensors"} <= set(members)
    reference = json.loads((tmp_path / "files" / "reference.json").read_text())
    assert len(reference["fallback"]["probabilities"]) == 32
    share = made.contract.accepted["explainer_disagreement"]
    assert share == pytest.approx(1 - made.contract.accepted["engine_agreement"], abs=1e-6)
    evaluate(str(tmp_path / "files"), DATA, cache, tmp_path / "results", card=tmp_path / "card.md")
    assert (
        f"different classes for {share:.2%} of these pictures ({share * 40:.0f})" in (tmp_path / "card.md").read_text()
    )


def test_packing_again_in_full_precision_drops_the_engine_of_before(run, tmp_path, cache):
    (tmp_path / "openvino-int8.bin").write_bytes(b"of another version")
    made = package(str(run), "1.2.5", tmp_path / "store", tmp_path, cache)
    assert "openvino-int8.bin" not in zipfile.ZipFile(made.archive).namelist()
