"""Folders of somebody's own images: a few large ones of two classes, and a thousand classes."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from contracts.model import Accepted, Contract, Input
from contracts.model import save as save_contract
from contracts.wire import ImageOptions, Options, parse_about
from handlers.evidence.store import EVIDENCE
from handlers.model import ServedModel, load_model
from handlers.network import build_network
from handlers.wire import Row
from training.package.evidence import MAX_BYTES
from training.package.packaging import Package, package
from training.recipe import Augmentation, Recipe
from training.train import train

pytestmark = pytest.mark.long

SAMPLES = Path(__file__).parents[2] / "samples"
MANY = 1000


def served(made: Package, folder: Path) -> ServedModel:
    with zipfile.ZipFile(made.archive) as members:
        members.extractall(folder)
    return load_model(folder, device="cpu", explains=False)


def explain(model: ServedModel, image: bytes, form: str = "json", **asked: object) -> bytes:
    options = Options(images=(ImageOptions(explain=True, **asked),), format=form)
    return model.answer([Row("predict", options, [image])])[0].body


def test_eight_large_images_of_each_of_two_classes_give_evidence_or_the_reason(tmp_path, cache):
    """From 224 pixels and `resnet18` to the answer, with what so few images allow."""
    for name in ("cat", "ship"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(8):
            Image.open(SAMPLES / name / f"{number}.png").resize((224, 224)).save(folder / f"{number}.png")
    data = f"imagefolder:{tmp_path / 'photos'}"
    recipe = Recipe(
        data=data, name="photos", validation=0.25, epochs=1, batch_size=4, workers=0, augmentation=Augmentation(0)
    )
    run = train(recipe, tmp_path / "run", cache, registers=False)
    made = package(str(run), "1", tmp_path / "store", tmp_path / "files", cache, explain_images=2, max_alike=1.0)
    contract = made.contract
    assert (contract.architecture, contract.input.height, contract.input.width) == ("resnet18", 224, 224)
    assert contract.explain.method in contract.explain.forward
    assert contract.accepted.figures.explanations.quarter is None, "a mosaic needs four classes"
    model = served(made, tmp_path / "archive")
    image = (tmp_path / "photos" / "cat" / "0.png").read_bytes()
    (entry,) = json.loads(explain(model, image, coverage=0.9, test=True))["results"]
    assert (entry["heatmap"]["height"], entry["heatmap"]["width"]) == (224, 224)
    assert entry["familiar"] == entry["familiarity"]
    assert "4 images were held out, and 20 are needed" in entry["familiar"]["unavailable"]
    assert {found["class"] for found in entry["similar"]} == {"cat", "ship"}
    assert {found["class"] for found in entry["classes"]} == {"cat", "ship"}, "4 images say little"
    assert set(entry["test"]) in ({"kept", "removed", "verdict"}, {"unavailable"})
    overlay = explain(model, image, "png")
    assert Image.open(io.BytesIO(overlay)).size == (224, 224)
    assert parse_about(overlay)["caption"] == f"{entry['class']} by {contract.explain.method}"


def test_a_thousand_classes_are_packed_within_the_limit_and_explained(tmp_path, cache):
    rng = np.random.default_rng(0)
    for label in range(MANY):
        folder = tmp_path / "photos" / f"{label:04d}"
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((8, 8)).resize((64, 64)).save(folder / f"{number}.png")
    recipe = Recipe(data=f"imagefolder:{tmp_path / 'photos'}", validation=0.5)
    classes = tuple(f"{label:04d}" for label in range(MANY))
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    torch.manual_seed(0)
    network = build_network("resnet18", MANY)
    save_file(network.state_dict(), untrained / "weights.safetensors")
    size = Input(64, 64, (0.5,) * 3, (0.25,) * 3)
    contract = Contract("many", "1", classes, size, "resnet18", accepted=Accepted(recipe=asdict(recipe)))
    save_contract(contract, untrained / "contract.json")
    made = package(str(untrained), "1", tmp_path / "store", tmp_path / "files", cache, max_alike=1.0)
    assert (made.folder / EVIDENCE).stat().st_size <= MAX_BYTES
    evidence = made.contract.evidence
    assert (evidence.similar.images, evidence.similar.thumbnails) == (MANY, True)
    assert (evidence.familiar.images, evidence.answer_set.images, evidence.absent) == (MANY, MANY, ())
    model = served(made, tmp_path / "archive")
    image = (tmp_path / "photos" / "0007" / "0.png").read_bytes()
    answer = explain(model, image, coverage=0.95)
    (entry,) = json.loads(answer)["results"]
    assert entry["class"] in classes
    assert 0 <= entry["familiarity"] <= 1
    assert len(entry["similar"]) == 2, "one of each class is in the index"
    assert 900 <= len(entry["classes"]) <= MANY, "an untrained network knows nothing"
    assert len(explain(model, image)) < 10_000
