"""The answers that drift is measured against: of held-out images, which are kept, or of a folder."""

import io
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from control.archive import file_sha256
from control.cli.main import app
from control.errors import ArchiveError, ControlError
from control.feedback.drift import Answers
from control.feedback.reference import _held_out, folder_answers, held_out_answers, image_answers
from control.images.archive_source import ArchiveSource
from gateway.feedback.store import FeedbackStore, LoggedCall
from training.data.images import divide, load_training_images
from training.package.export import package_directory

ROOT = Path(__file__).parents[3]
RELEASED = ROOT / "model_store" / "released"
HELD_OUT = 0.6
SAMPLES = Path(__file__).parents[2] / "samples"
DATA = f"imagefolder:{SAMPLES}"
RECIPE = {"data": DATA, "subset": 0, "validation": 0.2, "seed": 3}


def provenance(sha256):
    return {"data_sha256": sha256, "training_images": 80, "held_out_images": 20, "epochs": 1, "duration_s": 1,
            "processes": 1, "environments": []}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return load_training_images(DATA, Path())[0]


def test_kept_answers_are_read_again_for_the_same_bytes_only(write_archive, tmp_path):
    archive, home = write_archive(tmp_path / "m-1.0.mar"), tmp_path / "home"
    kept = Answers(("cat", "dog"), (0.9, 0.8), (True, False))
    (home / "drift").mkdir(parents=True)
    (home / "drift" / f"{file_sha256(archive)}.json").write_text(json.dumps(asdict(kept)))
    assert held_out_answers(archive, tmp_path, home) == kept
    write_archive(archive, comment=b"other bytes")
    with pytest.raises(ControlError, match="does not say what it was trained on"):
        held_out_answers(archive, tmp_path, home)


def test_held_out_images_are_those_that_the_training_held_out(write_archive, tmp_path, images):
    accepted = {"recipe": RECIPE, "provenance": provenance(images.sha256())}
    found = list(_held_out(write_archive(tmp_path / "m-1.0.mar", accepted=accepted), tmp_path))
    _, held_out = divide(images, subset=0, validation=0.2, seed=3)
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in found]
    np.testing.assert_array_equal(np.stack(pixels), held_out.images)


@pytest.mark.parametrize(
    ("accepted", "reason"),
    [
        ({}, "does not say what it was trained on"),
        ({"recipe": RECIPE, "provenance": provenance("0" * 64)}, "are not those of the training any more"),
        ({"recipe": RECIPE | {"data": "imagefolder:gone"}, "provenance": provenance("0" * 64)}, "gone"),
    ],
)
def test_a_training_whose_images_cannot_be_had_names_the_other_references(write_archive, tmp_path, accepted, reason):
    archive = write_archive(tmp_path / "m-1.0.mar", accepted=accepted)
    with pytest.raises(ControlError, match=rf"{reason}.*--reference earlier.*--reference FOLDER"):
        held_out_answers(archive, tmp_path, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_files_that_are_no_images_are_left_out_of_a_folders_answers(released_archive, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").write_bytes((SAMPLES / name / "0.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    found = folder_answers(released_archive, tmp_path)
    assert (len(found.classes), len(found.confidences)) == (2, 2)


def test_an_archive_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ArchiveError):
        image_answers(tmp_path / "gone.mar", [])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The samples twice, as a folder to train on: 200 images."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((ROOT / "tests" / "samples").rglob("*.png")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        for copy in "ab":
            shutil.copy(path, folder / path.parent.name / f"{copy}{path.name}")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The released model, packed as if it had been trained on `photos`."""
    source = Path(shutil.copytree(RELEASED, tmp_path_factory.mktemp("source") / "released"))
    contract = json.loads((source / "contract.json").read_text())
    images, _ = load_training_images(f"imagefolder:{photos}", photos)
    contract["accepted"]["recipe"] |= {"data": f"imagefolder:{photos}", "validation": HELD_OUT}
    contract["accepted"]["provenance"]["data_sha256"] = images.sha256()
    (source / "contract.json").write_text(json.dumps(contract))
    return package_directory(source, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def home(trained, tmp_path_factory):
    """A GRADSERVE_HOME in which the archive's reference is kept, and what it was when it was answered."""
    folder = tmp_path_factory.mktemp("home")
    return folder, held_out_answers(trained, folder, folder)


def test_the_reference_is_answered_once_and_then_kept(trained, home, monkeypatch):
    folder, found = home
    assert (len(found), len(found.familiar), len(set(found.classes))) == (120, 120, 10)
    monkeypatch.setattr(ArchiveSource, "predict", None)  # asked again, this fails
    assert held_out_answers(trained, folder, folder) == found


def test_drift_is_found_against_the_images_that_training_held_out(trained, home, tmp_path):
    store = FeedbackStore(tmp_path / "feedback.db")
    store.create()
    for number in range(120):
        name = "cat" if number % 2 else "dog"
        store.add([LoggedCall(f"r{number}", time.time() - 60, "cifar10", "1.0.0", name, 0.99, True, {}, None)])
    arguments = ["drift", "--archive", str(trained), "--store", str(store.path), "--json"]
    result = CliRunner().invoke(app, arguments, env={"GRADSERVE_HOME": str(home[0])}, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert (result.exit_code, found["decision"], found["recent"], found["reference"]) == (3, "drift", 120, 120)
    assert "classes" in [row["about"] for row in found["comparisons"] if row["is_drift"]]
