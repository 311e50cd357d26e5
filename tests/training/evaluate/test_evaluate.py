import io
import json
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from contracts.model import Accepted, Ancestor
from contracts.model import load as load_contract
from contracts.model import save as save_contract
from contracts.wire import ImageOptions, Options
from handlers.build import digest
from handlers.engines import softmax
from handlers.evidence.store import read_store
from handlers.model import ServedModel, load_model
from handlers.wire import Row
from training.errors import DataError, ExportError, HeatmapsAlike, ModelError
from training.evaluate.calibration import expected_calibration_error, fit_temperature
from training.evaluate.card import write_card
from training.evaluate.evaluate import evaluate, measure
from training.evaluate.figures import plot_confusion
from training.evaluate.inference import predict_logits
from training.package.artifacts import read_model
from training.package.engine_gate import GateRefused
from training.package.packaging import Package, package, split_images
from training.recipe import Augmentation, Recipe, recipe_from_dict
from training.tracking.registry import register
from training.tracking.releases import fetch_archive, find_release
from training.tracking.store import tracking_uri
from training.train import train

SAMPLES = Path(__file__).parents[2] / "samples"
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


def test_calibration_error_weighs_bins_by_their_images():
    """One of 10 images is answered with 1.0 and wrongly, the rest with 1.0 and rightly."""
    assert expected_calibration_error(one_hot([0] * 10), np.array([1] + [0] * 9)) == pytest.approx(0.1)


def test_images_that_are_all_right_say_nothing_about_confidence(caplog):
    logits = np.tile(np.float32([[2.0, 0.0], [0.0, 2.0]]), (20, 1))
    assert fit_temperature(logits, np.tile([0, 1], 20)) == 1.0
    assert "uncalibrated" in caplog.text


def test_confusion_of_many_classes_is_drawn(tmp_path):
    classes = tuple(f"class {number}" for number in range(900))
    plot_confusion(np.eye(900, dtype=int).tolist(), classes, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert max(image.size) < 5000


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
        data=DATA, epochs=1, batch_size=16, sizes=((0.0, 8),), workers=0, validation=0.2, augmentation=Augmentation(0)
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "run", cache, registers=False)


def evaluated(source: Path | str, output: Path, cache: Path, *, card: Path | None = None, **counts: int) -> dict:
    counts = {"explained": 0, **counts}
    return evaluate(str(source), DATA, cache, output, looks=output / "looks.jsonl", card=card, **counts)


@dataclass(frozen=True)
class Evaluation:
    report: dict
    folder: Path
    run_id: str
    number: str


@pytest.fixture(scope="module")
def evaluation(run, tmp_path_factory, cache) -> Evaluation:
    """Of the registered run."""
    run_id = json.loads((run / "contract.json").read_text())["accepted"]["run_id"]
    number = register(run, run_id)
    MlflowClient(tracking_uri()).set_terminated(run_id, "KILLED")
    folder: Path = tmp_path_factory.mktemp("results")
    return Evaluation(
        evaluated(run, folder, cache, explained=4, corrupted=2, card=folder / "card.md"), folder, run_id, number
    )


@pytest.fixture(scope="module")
def packed(run, evaluation, tmp_path_factory, cache) -> Package:
    folder = tmp_path_factory.mktemp("packed")
    return package(str(run), "1.2.3", folder / "store", folder / "files", cache)


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
    run, evaluation, tmp_path, cache
):
    looks = evaluation.folder / "looks.jsonl"
    first, report = looks.read_text(), evaluation.report
    line = json.loads(first)
    assert line["weights_sha256"] == report["model"]["weights_sha256"]
    assert (line["accuracy"], line["images"], line["data"]) == (report["accuracy"], 20, "imagefolder")
    assert report["data"]["part"] == line["part"] == "held-out"
    _, held_out = split_images(recipe_from_dict(load_contract(run / "contract.json").accepted.recipe), cache)
    assert report["data"]["sha256"] == held_out.sha256()
    assert "held-out images, which made the model's choices" in (evaluation.folder / "card.md").read_text()
    shutil.copytree(SAMPLES, tmp_path / "others" / "test")
    (tmp_path / "others" / "test" / "cat" / "0.png").unlink()
    other = evaluate(str(run), f"imagefolder:{tmp_path}/others", cache, tmp_path, looks=looks, explained=0)
    assert other["data"]["part"] == "test"
    assert looks.read_text().startswith(first)
    assert [json.loads(line)["images"] for line in looks.read_text().splitlines()] == [20, 99]


def test_card_tells_of_the_models_that_a_training_began_with(run, evaluation):
    contract = load_contract(run / "contract.json")
    accepted = contract.accepted
    before = replace(accepted, recipe={"rate": 0.7}, provenance=replace(accepted.provenance, epochs=76))
    ancestor = Ancestor("cifar10", "0.5.0", before)
    card = write_card(replace(contract, accepted=replace(accepted, ancestor=ancestor)), evaluation.report)
    own, earlier = card.split("### cifar10 0.5.0, before that")
    assert "It began with the weights of cifar10 0.5.0." in own
    assert "| epochs | `76` |" in earlier
    assert "| rate | `0.7` |" in earlier
    assert "began with the weights" not in evaluation.folder.joinpath("card.md").read_text()


def test_explanations_are_measured_for_file_and_card(run, evaluation):
    report = evaluation.report
    written = json.loads((evaluation.folder / "explanations.json").read_text())
    assert written["explanation"] == report["explanation"]
    assert written["model"] == report["model"]
    assert written["explanation"]["images"] == 4
    assert [*written["explanation"]["randomised"]] == ["layer4", "layer3", "layer2", "layer1", "bn1", "conv1"]
    card = (evaluation.folder / "card.md").read_text()
    assert f"accuracy **{report['accuracy']:.2%}**" in card
    assert "| training images | `80` |" in card
    frost = report["corrupted"]["kinds"]["frost"]
    assert f"| frost | {frost['severities'][0]['accuracy']:.3f} (" in card
    assert f"| {frost['accuracy']:.3f} ({frost['expected_calibration_error']:.3f}) |" in card
    (where,) = json.loads((run / "contract.json").read_text())["accepted"]["provenance"]["environments"]
    assert f"| git commit | `{where['git_commit']}` |" in card
    assert f"| heatmaps | {report['explanation']['curves']['deletion_area']:.3f} |" in card


def test_run_is_evaluated_from_mlflow_as_from_its_folder(evaluation, tmp_path, cache):
    from_mlflow = evaluated(f"runs:/{evaluation.run_id}", tmp_path, cache)
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


def test_evaluation_refuses_a_file_for_a_folder_before_it_looks(run, tmp_path, cache):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="name another"):
        evaluate(str(run), DATA, cache, tmp_path / "file", looks=tmp_path / "looks.jsonl")
    with pytest.raises(ModelError, match="name another"):
        evaluate(str(run), DATA, cache, tmp_path, looks=tmp_path / "looks.jsonl", card=tmp_path / "file" / "CARD.md")
    assert not (tmp_path / "looks.jsonl").exists()


def test_images_that_an_ancestor_learnt_from_are_called_learnt_from(run, tmp_path, cache):
    """By default a model is measured on what it learnt from, here a folder without a test part."""
    shutil.copytree(run, tmp_path / "run")
    contract = load_contract(run / "contract.json")
    ancestor = Ancestor("first", "1", contract.accepted)
    accepted = Accepted(recipe={"data": "imagefolder:elsewhere"}, ancestor=ancestor)
    save_contract(replace(contract, accepted=accepted), tmp_path / "run" / "contract.json")
    report = evaluated(tmp_path / "run", tmp_path, cache)
    assert report["data"]["part"] == "training"
    with pytest.raises(DataError, match="elsewhere"):
        evaluate(str(tmp_path / "run"), None, cache, tmp_path, looks=tmp_path / "looks.jsonl")


def test_missing_model_says_how_to_make_one(tmp_path, cache):
    with pytest.raises(ModelError, match="gradserve train"):
        evaluated(tmp_path, tmp_path, cache)


def test_package_keeps_what_it_measured(packed, tmp_path, cache):
    contract = packed.contract
    assert packed.archive.name == "cifar10-1.2.3.mar"
    assert contract.accepted.figures.held_out_images == 20  # fewer than the references, which repeat them
    assert contract.engine.temperature != pytest.approx(1, abs=0.05)
    report = evaluated(packed.folder, tmp_path, cache)
    assert report["model"]["version"] == "1.2.3"
    _, images = split_images(recipe_from_dict(contract.accepted.recipe), cache)
    logits = predict_logits(read_model(packed.folder)[1], images.images, contract.input).numpy()
    for when, temperature in (("_before", 1.0), ("", contract.engine.temperature)):
        expected = expected_calibration_error(softmax(logits, temperature), images.labels)
        assert report[f"expected_calibration_error{when}"] == pytest.approx(expected, abs=1e-3)


def test_archive_contract_and_card_tell_of_the_same_evidence_as_the_answers(packed, tmp_path, cache):
    """From packing to answers: what is measured about evidence is what the handler of the archive gives."""
    with zipfile.ZipFile(packed.archive) as members:
        members.extractall(tmp_path / "archive")
    served = load_model(tmp_path / "archive", device="cpu", explains=False)
    settings = served.contract.evidence
    assert settings == packed.contract.evidence
    store = read_store(tmp_path / "archive")
    assert len(store["familiarity_scores"]) == settings.familiar.images == 20
    assert len(store["answer_set_scores"]) == settings.answer_set.images == 20
    assert len(store["labels"]) == settings.similar.images == 80, "everything that it learnt from"
    report = json.loads((tmp_path / "archive" / "familiarity.json").read_text())
    best = report["candidates"][0]
    assert settings.familiar.method == best["method"]
    assert dict(served.contract.accepted.figures.familiarity) == best["far"] | best["near"]

    measured = evaluated(packed.folder, tmp_path / "results", cache, card=tmp_path / "card.md")
    _, held_out = split_images(recipe_from_dict(served.contract.accepted.recipe), cache)
    entries = explained(served, held_out.images, coverage=0.9)
    is_familiar = np.mean([entry["familiar"] for entry in entries])
    assert measured["familiarity"]["familiar"] == pytest.approx(is_familiar, abs=1e-4)
    sets = [[one["class"] for one in entry["classes"]] for entry in entries]
    names = [held_out.classes[label] for label in held_out.labels]
    (figures,) = (row for row in measured["answer_sets"] if row["asked"] == 0.9)
    covered = np.mean([name in of_image for name, of_image in zip(names, sets, strict=True)])
    assert figures["served_coverage"] == pytest.approx(covered, abs=1e-4)
    assert figures["mean_size"] == pytest.approx(np.mean([*map(len, sets)]), abs=1e-4)
    assert covered >= 0.9
    card = (tmp_path / "card.md").read_text()
    for told in (
        f"images {is_familiar:.1%} are:",
        "from 80 training images",
        f"| {covered:.4f} | {figures['mean_size']:.3f} |",
    ):
        assert told in card
    assert all(f"| {name} | {area:.3f} |" in card for name, area in (best["far"] | best["near"]).items())


def explained(served: ServedModel, images: np.ndarray, *, coverage: float) -> list[dict]:
    """Return the handler's explanations of images (N, H, W, 3)."""
    files = [io.BytesIO() for _ in images]
    for pixels, file in zip(images, files, strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    asked = (ImageOptions(explain=True, coverage=coverage),) * len(images)
    row = Row("predict", Options(images=asked, format="json"), [file.getvalue() for file in files])
    return json.loads(served.answer([row])[0].body)["results"]


def test_packing_a_registered_model_registers_its_archive_with_its_hash(packed, tmp_path):
    release = find_release("cifar10", alias="challenger")
    assert (release.version, release.sha256) == ("1.2.3", digest(packed.archive))
    assert digest(fetch_archive(release, tmp_path)) == release.sha256


def test_a_quantised_package_carries_its_gate_report_and_its_fallback(run, tmp_path, cache):
    made = package(str(run), "1.2.4", tmp_path / "store", tmp_path / "files", cache, precision="int8", max_drop=1.0)
    assert (made.contract.engine.name, made.contract.engine.precision) == ("openvino", "int8")
    assert made.contract.fallback.name == "eager"
    members = zipfile.ZipFile(made.archive).namelist()
    assert {"openvino-int8.xml", "openvino-int8.bin", "gate.json", "weights.safetensors"} <= set(members)
    reference = json.loads((tmp_path / "files" / "reference.json").read_text())
    assert len(reference["fallback"]["probabilities"]) == 32
    figures = made.contract.accepted.figures
    share = figures.explainer_disagreement
    assert share == pytest.approx(1 - figures.engine_agreement, abs=1e-6)
    evaluated(tmp_path / "files", tmp_path / "results", cache, card=tmp_path / "card.md")
    told = f"different classes for {share:.2%} of the held-out images ({share * 20:.0f})"
    assert told in (tmp_path / "card.md").read_text()


def test_full_precision_can_be_packed_for_openvino(run, tmp_path, cache):
    made = package(str(run), "1.2.8", tmp_path / "store", tmp_path / "files", cache, engine="openvino", max_drop=1.0)
    assert (made.contract.engine.name, made.contract.engine.precision) == ("openvino", "fp32")
    assert made.contract.fallback.name == "eager"
    assert {"openvino.xml", "openvino.bin", "gate.json"} <= set(zipfile.ZipFile(made.archive).namelist())


def test_packing_again_in_full_precision_drops_the_engine_of_before(run, tmp_path, cache):
    (tmp_path / "openvino-int8.bin").write_bytes(b"of another version")
    made = package(str(run), "1.2.5", tmp_path / "store", tmp_path, cache)
    assert "openvino-int8.bin" not in zipfile.ZipFile(made.archive).namelist()


def test_a_refused_package_leaves_the_version_in_its_folder_as_it_was(run, packed, tmp_path, cache):
    folder = tmp_path / "files"
    shutil.copytree(packed.folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(GateRefused):
        package(str(run), "1.2.6", tmp_path / "store", folder, cache, precision="int8", max_drop=-1.0)
    report = json.loads((folder / "gate-refused.json").read_text())
    assert "agreement_by_class" in report, "what to decide by whether the bound may be raised"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "gate-refused.json"} == before
    again = package(str(run), "1.2.7", tmp_path / "store", folder, cache)
    assert not (folder / "gate-refused.json").exists()
    assert not any(name.startswith("gate") for name in zipfile.ZipFile(again.archive).namelist())


def test_a_version_whose_heatmaps_are_the_same_for_every_class_is_refused_and_leaves_nothing(run, tmp_path, cache):
    blind = shutil.copytree(run, tmp_path / "run")
    weights = torch.load(blind / "best.pth", weights_only=True)
    weights["fc.weight"][:] = weights["fc.weight"][0]
    torch.save(weights, blind / "best.pth")
    with pytest.raises(HeatmapsAlike, match="hardly depend on the class"):
        package(str(blind), "1", tmp_path / "store", tmp_path / "files", cache)
    assert not (tmp_path / "store").exists()
    assert list((tmp_path / "files").iterdir()) == []
    made = package(str(blind), "1", tmp_path / "store", tmp_path / "files", cache, max_alike=1)
    assert made.contract.accepted.figures.explain_class_correlation > 0.5


def test_packing_a_packed_version_again_keeps_no_figures_of_its_engine(run, tmp_path, cache):
    first = package(str(run), "1", tmp_path / "s", tmp_path / "a", cache, precision="int8", max_drop=1.0)
    assert first.contract.accepted.figures.served is not None
    again = package(str(first.folder), "2", tmp_path / "s", tmp_path / "b", cache)
    assert (again.contract.accepted.figures.served, again.contract.accepted.figures.engine_agreement) == (None, None)


@pytest.mark.parametrize("version", ["../1", "1 0", ""])
def test_version_that_no_plan_takes_is_refused(run, tmp_path, cache, version):
    with pytest.raises(ExportError, match="version"):
        package(str(run), version, tmp_path / "store", tmp_path / "files", cache)


def test_images_that_were_added_since_do_not_make_learnt_ones_held_out_or_test(tmp_path, cache):
    images = tmp_path / "images"
    shutil.copytree(SAMPLES, images)
    recipe = Recipe(data=f"imagefolder:{images}", epochs=1, batch_size=16, sizes=((0.0, 8),), workers=0)
    trained = train(recipe, tmp_path / "run", cache, registers=False)
    shutil.copyfile(SAMPLES / "cat" / "0.png", images / "dog" / "another.png")
    with pytest.raises(DataError, match="not those that the model was trained with"):
        package(str(trained), "1", tmp_path / "store", tmp_path / "files", cache)
    report = evaluate(str(trained), recipe.data, cache, tmp_path, looks=tmp_path / "looks.jsonl", explained=0)
    assert report["data"]["part"] == "training"
