import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contracts.wire import ImageOptions, Options
from handlers.build import digest
from handlers.engines import softmax
from handlers.errors import EngineError
from handlers.evidence.store import read_store
from handlers.model import ServedModel, load_model
from handlers.wire import Row
from training.errors import DataError, ExportError, HeatmapsAlike
from training.evaluate.calibration import expected_calibration_error
from training.evaluate.evaluate import evaluate
from training.evaluate.inference import predict_logits
from training.package.artifacts import read_model
from training.package.engine_gate import GateRefused
from training.package.packaging import Package, choose_engine, package, split_images
from training.recipe import recipe_from_dict
from training.tracking.releases import fetch_archive, find_release

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize(
    ("name", "precision", "chosen"),
    [
        (None, "fp32", "eager"),
        (None, "bf16", "openvino"),
        (None, "int8", "openvino"),
        ("eager", "fp32", "eager"),
        ("openvino", "fp32", "openvino"),
        ("openvino", "int8", "openvino"),
    ],
)
def test_engine_follows_from_the_precision_unless_it_is_named(name, precision, chosen):
    assert choose_engine(name, precision) == chosen


@pytest.mark.parametrize(
    ("name", "precision", "reason"),
    [
        ("onnx", "fp32", "no engine 'onnx': pass --engine eager or openvino"),
        ("eager", "int8", "eager is packed in fp32, not in 'int8'"),
        (None, "fp16", "openvino is packed in fp32, bf16, int8, not in 'fp16'"),
    ],
)
def test_engine_that_cannot_be_packed_is_refused_before_the_model_is_read(name, precision, reason, tmp_path):
    with pytest.raises(EngineError, match=reason):
        package("nowhere", "1", tmp_path, tmp_path / "files", tmp_path, precision=precision, engine=name)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def packed(registered, tmp_path_factory, cache) -> Package:
    """The first package of the registered run."""
    folder = tmp_path_factory.mktemp("packed")
    return package(str(registered.folder), "1.2.3", folder / "store", folder / "files", cache)


def test_package_keeps_what_it_measured(packed, tmp_path, cache, evaluated):
    contract = packed.contract
    assert packed.archive.name == "cifar10-1.2.3.mar"
    assert contract.accepted.figures.held_out_images == 20  # fewer than the references, which repeat them
    assert contract.engine.temperature != pytest.approx(1, abs=0.05)
    report = evaluated(packed.folder, tmp_path)
    assert report["model"]["version"] == "1.2.3"
    _, images = split_images(recipe_from_dict(contract.accepted.recipe), cache)
    logits = predict_logits(read_model(packed.folder)[1], images.images, contract.input).numpy()
    for when, temperature in (("_before", 1.0), ("", contract.engine.temperature)):
        expected = expected_calibration_error(softmax(logits, temperature), images.labels)
        assert report[f"expected_calibration_error{when}"] == pytest.approx(expected, abs=1e-3)


def test_archive_contract_and_card_tell_of_the_same_evidence_as_the_answers(packed, tmp_path, cache, evaluated):
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

    measured = evaluated(packed.folder, tmp_path / "results", card=tmp_path / "card.md")
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


def test_packing_a_registered_model_registers_its_archive_with_its_hash(packed, registered, tmp_path):
    release = find_release("cifar10", number=registered.number)
    assert (release.version, release.sha256) == ("1.2.3", digest(packed.archive))
    assert digest(fetch_archive(release, tmp_path)) == release.sha256


@pytest.mark.long
def test_a_quantised_package_carries_its_gate_report_and_its_fallback(run_folder, tmp_path, cache, evaluated):
    made = package(
        str(run_folder), "1.2.4", tmp_path / "store", tmp_path / "files", cache, precision="int8", max_drop=1.0
    )
    assert (made.contract.engine.name, made.contract.engine.precision) == ("openvino", "int8")
    assert made.contract.fallback.name == "eager"
    members = zipfile.ZipFile(made.archive).namelist()
    assert {"openvino-int8.xml", "openvino-int8.bin", "gate.json", "weights.safetensors"} <= set(members)
    reference = json.loads((tmp_path / "files" / "reference.json").read_text())
    assert len(reference["fallback"]["probabilities"]) == 32
    figures = made.contract.accepted.figures
    share = figures.explainer_disagreement
    assert share == pytest.approx(1 - figures.engine_agreement, abs=1e-6)
    evaluated(tmp_path / "files", tmp_path / "results", card=tmp_path / "card.md")
    told = f"different classes for {share:.2%} of the held-out images ({share * 20:.0f})"
    assert told in (tmp_path / "card.md").read_text()


@pytest.mark.long
def test_full_precision_can_be_packed_for_openvino(run_folder, tmp_path, cache):
    made = package(
        str(run_folder), "1.2.8", tmp_path / "store", tmp_path / "files", cache, engine="openvino", max_drop=1.0
    )
    assert (made.contract.engine.name, made.contract.engine.precision) == ("openvino", "fp32")
    assert made.contract.fallback.name == "eager"
    assert {"openvino.xml", "openvino.bin", "gate.json"} <= set(zipfile.ZipFile(made.archive).namelist())


@pytest.mark.long
def test_packing_again_in_full_precision_drops_the_engine_of_before(run_folder, tmp_path, cache):
    (tmp_path / "openvino-int8.bin").write_bytes(b"of another version")
    made = package(str(run_folder), "1.2.5", tmp_path / "store", tmp_path, cache)
    assert "openvino-int8.bin" not in zipfile.ZipFile(made.archive).namelist()


@pytest.mark.long
def test_a_refused_package_leaves_the_version_in_its_folder_as_it_was(run_folder, packed, tmp_path, cache):
    folder = tmp_path / "files"
    shutil.copytree(packed.folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(GateRefused):
        package(str(run_folder), "1.2.6", tmp_path / "store", folder, cache, precision="int8", max_drop=-1.0)
    report = json.loads((folder / "gate-refused.json").read_text())
    assert "agreement_by_class" in report, "what to decide by whether the bound may be raised"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "gate-refused.json"} == before
    again = package(str(run_folder), "1.2.7", tmp_path / "store", folder, cache)
    assert not (folder / "gate-refused.json").exists()
    assert not any(name.startswith("gate") for name in zipfile.ZipFile(again.archive).namelist())


@pytest.mark.long
def test_a_version_whose_heatmaps_are_the_same_for_every_class_is_refused_and_leaves_nothing(
    run_folder, tmp_path, cache
):
    blind = shutil.copytree(run_folder, tmp_path / "run")
    weights = torch.load(blind / "best.pth", weights_only=True)
    weights["fc.weight"][:] = weights["fc.weight"][0]
    torch.save(weights, blind / "best.pth")
    with pytest.raises(HeatmapsAlike, match="hardly depend on the class"):
        package(str(blind), "1", tmp_path / "store", tmp_path / "files", cache)
    assert not (tmp_path / "store").exists()
    assert list((tmp_path / "files").iterdir()) == []
    made = package(str(blind), "1", tmp_path / "store", tmp_path / "files", cache, max_alike=1)
    assert made.contract.accepted.figures.explain_class_correlation > 0.5


@pytest.mark.long
def test_packing_a_packed_version_again_keeps_no_figures_of_its_engine(run_folder, tmp_path, cache):
    first = package(str(run_folder), "1", tmp_path / "s", tmp_path / "a", cache, precision="int8", max_drop=1.0)
    assert first.contract.accepted.figures.served is not None
    again = package(str(first.folder), "2", tmp_path / "s", tmp_path / "b", cache)
    assert (again.contract.accepted.figures.served, again.contract.accepted.figures.engine_agreement) == (None, None)


@pytest.mark.parametrize("version", ["../1", "1 0", ""])
def test_version_that_no_plan_takes_is_refused(run_folder, tmp_path, cache, version):
    with pytest.raises(ExportError, match="version"):
        package(str(run_folder), version, tmp_path / "store", tmp_path / "files", cache)


def test_images_that_were_added_since_do_not_make_learnt_ones_held_out_or_test(run_folder, tmp_path, cache):
    data = f"imagefolder:{shutil.copytree(SAMPLES, tmp_path / 'images')}"
    trained = shutil.copytree(run_folder, tmp_path / "run")
    contract = json.loads((trained / "contract.json").read_text())
    contract["accepted"]["recipe"]["data"] = data
    (trained / "contract.json").write_text(json.dumps(contract))
    accepted = contract["accepted"]
    split_images(recipe_from_dict(accepted["recipe"]), cache, sha256=accepted["provenance"]["data_sha256"])
    shutil.copyfile(SAMPLES / "cat" / "0.png", tmp_path / "images" / "dog" / "another.png")
    with pytest.raises(DataError, match="not those that the model was trained with"):
        package(str(trained), "1", tmp_path / "store", tmp_path / "files", cache)
    report = evaluate(str(trained), data, cache, tmp_path, looks=tmp_path / "looks.jsonl", explained=0)
    assert report["data"]["part"] == "training"
