import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from contracts.model import Accepted, Ancestor
from contracts.model import load as load_contract
from contracts.model import save as save_contract
from training.errors import DataError, ModelError
from training.evaluate.evaluate import evaluate, measure
from training.package.packaging import split_images
from training.recipe import recipe_from_dict
from training.tracking.store import tracking_uri

SAMPLES = Path(__file__).parents[2] / "samples"
DATA = f"imagefolder:{SAMPLES}"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's report, and the folder of its files."""

    report: dict
    folder: Path
    run_id: str
    number: str


@pytest.fixture(scope="module")
def evaluation(registered, evaluated, tmp_path_factory) -> Evaluation:
    """The evaluation of the registered run, whose training was killed."""
    MlflowClient(tracking_uri()).set_terminated(registered.run_id, "KILLED")
    folder: Path = tmp_path_factory.mktemp("results")
    report = evaluated(registered.folder, folder, explained=2, corrupted=1, card=folder / "card.md")
    return Evaluation(report, folder, registered.run_id, registered.number)


def test_figures_of_a_case_counted_by_hand():
    """True cat, cat, dog, dog, dog; answered cat, dog, dog, dog, cat; nobody answers fox."""
    figures = measure(np.eye(3, dtype=np.float32)[[0, 1, 1, 1, 0]], np.array([0, 0, 1, 1, 1]), ("cat", "dog", "fox"))
    assert figures.accuracy == pytest.approx(3 / 5)
    assert figures.confusion == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert figures.per_class["cat"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2})
    assert figures.per_class["dog"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert figures.per_class["fox"]["precision"] == 0
    assert figures.macro["f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_report_names_model_data_and_versions(evaluation):
    report = {key: value for key, value in evaluation.report.items() if key != "explanation"}
    assert json.loads((evaluation.folder / "metrics.json").read_text()) == report
    assert report["data"]["images"] == 20
    assert len(report["data"]["sha256"]) == len(report["model"]["weights_sha256"]) == 64
    assert np.trace(report["confusion"]) == pytest.approx(20 * report["accuracy"])
    assert "version_torch" in report["environment"]
    for image in ("confusion", "calibration", "samples", "explanations"):
        assert (evaluation.folder / f"{image}.png").read_bytes().startswith(b"\x89PNG")


def test_every_look_adds_a_line_and_a_folder_without_a_test_part_is_measured_on_what_was_held_out(
    run_folder, evaluation, tmp_path, cache
):
    looks = evaluation.folder / "looks.jsonl"
    first, report = looks.read_text(), evaluation.report
    line = json.loads(first)
    assert line["weights_sha256"] == report["model"]["weights_sha256"]
    assert (line["accuracy"], line["images"], line["data"]) == (report["accuracy"], 20, "imagefolder")
    assert report["data"]["part"] == line["part"] == "held-out"
    _, held_out = split_images(recipe_from_dict(load_contract(run_folder / "contract.json").accepted.recipe), cache)
    assert report["data"]["sha256"] == held_out.sha256()
    assert "held-out images, which made the model's choices" in (evaluation.folder / "card.md").read_text()
    shutil.copytree(SAMPLES, tmp_path / "others" / "test")
    (tmp_path / "others" / "test" / "cat" / "0.png").unlink()
    other = evaluate(str(run_folder), f"imagefolder:{tmp_path}/others", cache, tmp_path, looks=looks, explained=0)
    assert other["data"]["part"] == "test"
    assert looks.read_text().startswith(first)
    assert [json.loads(line)["images"] for line in looks.read_text().splitlines()] == [20, 99]


def test_explanations_are_measured_for_file_and_card(run_folder, evaluation):
    report = evaluation.report
    written = json.loads((evaluation.folder / "explanations.json").read_text())
    assert written["explanation"] == report["explanation"]
    assert written["model"] == report["model"]
    assert written["explanation"]["images"] == 2
    assert [*written["explanation"]["randomised"]] == ["layer4", "layer3", "layer2", "layer1", "bn1", "conv1"]
    card = (evaluation.folder / "card.md").read_text()
    assert f"accuracy **{report['accuracy']:.2%}**" in card
    assert "| training images | `80` |" in card
    frost = report["corrupted"]["kinds"]["frost"]
    assert f"| frost | {frost['severities'][0]['accuracy']:.3f} (" in card
    assert f"| {frost['accuracy']:.3f} ({frost['expected_calibration_error']:.3f}) |" in card
    (where,) = json.loads((run_folder / "contract.json").read_text())["accepted"]["provenance"]["environments"]
    assert f"| git commit | `{where['git_commit']}` |" in card
    assert f"| heatmaps | {report['explanation']['curves']['deletion_area']:.3f} |" in card


def test_run_is_evaluated_from_mlflow_as_from_its_folder(evaluation, tmp_path, evaluated):
    from_mlflow = evaluated(f"runs:/{evaluation.run_id}", tmp_path)
    assert from_mlflow["confusion"] == evaluation.report["confusion"]
    assert from_mlflow["model"]["weights_sha256"] == evaluation.report["model"]["weights_sha256"]


def test_figures_are_the_registered_versions_own(evaluation):
    report, run_id = evaluation.report, evaluation.run_id
    client = MlflowClient(tracking_uri())
    version = client.get_model_version("cifar10", evaluation.number)
    assert version.tags["held_out_accuracy"] == f"{report['accuracy']:.4f}"
    assert version.tags["held_out_weights_sha256"] == report["model"]["weights_sha256"]
    (logged,) = client.get_run(run_id).outputs.model_outputs
    metrics = client.get_logged_model(logged.model_id).metrics
    found = {(metric.key, metric.value, metric.dataset_name, metric.dataset_digest) for metric in metrics}
    assert ("held_out_accuracy", report["accuracy"], "imagefolder held-out", report["data"]["sha256"][:36]) in found
    assert {file.path for file in client.list_artifacts(run_id, "evaluation")} >= {
        "evaluation/metrics.json",
        "evaluation/explanations.json",
        "evaluation/samples.png",
    }


def test_evaluation_leaves_the_trainings_status_alone(evaluation):
    assert MlflowClient(tracking_uri()).get_run(evaluation.run_id).info.status == "KILLED"


def test_evaluation_refuses_a_file_for_a_folder_before_it_looks(run_folder, tmp_path, cache):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="name another"):
        evaluate(str(run_folder), DATA, cache, tmp_path / "file", looks=tmp_path / "looks.jsonl")
    with pytest.raises(ModelError, match="name another"):
        evaluate(
            str(run_folder), DATA, cache, tmp_path, looks=tmp_path / "looks.jsonl", card=tmp_path / "file" / "CARD.md"
        )
    assert not (tmp_path / "looks.jsonl").exists()


def test_images_that_an_ancestor_learnt_from_are_called_learnt_from(run_folder, tmp_path, cache, evaluated):
    """By default a model is measured on what it learnt from, here a folder without a test part."""
    shutil.copytree(run_folder, tmp_path / "run")
    contract = load_contract(run_folder / "contract.json")
    ancestor = Ancestor("first", "1", contract.accepted)
    accepted = Accepted(recipe={"data": "imagefolder:elsewhere"}, ancestor=ancestor)
    save_contract(replace(contract, accepted=accepted), tmp_path / "run" / "contract.json")
    report = evaluated(tmp_path / "run", tmp_path)
    assert report["data"]["part"] == "training"
    with pytest.raises(DataError, match="elsewhere"):
        evaluate(str(tmp_path / "run"), None, cache, tmp_path, looks=tmp_path / "looks.jsonl")
