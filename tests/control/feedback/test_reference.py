"""The reference of `gradserve drift`: the archive's answers to the images that its training held out."""

import json
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from control.errors import ControlError
from control.feedback.reference import held_out_answers
from control.images.archive_source import ArchiveSource
from gateway.feedback.store import FeedbackStore, LoggedCall
from training.data.images import load_training_images
from training.package.export import package_directory

ROOT = Path(__file__).parents[3]
RELEASED = ROOT / "model_store" / "released"
HELD_OUT = 0.6


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
def make_archive(photos, tmp_path_factory):
    """`make_archive(**accepted)`: the released model, as if it had been trained on `photos`."""

    def make(**accepted):
        source = Path(shutil.copytree(RELEASED, tmp_path_factory.mktemp("source") / "released"))
        contract = json.loads((source / "contract.json").read_text())
        images, _ = load_training_images(f"imagefolder:{photos}", photos)
        contract["accepted"]["recipe"] |= {"data": f"imagefolder:{photos}", "validation": HELD_OUT}
        contract["accepted"]["provenance"]["data_sha256"] = images.sha256()
        contract["accepted"] |= accepted
        (source / "contract.json").write_text(json.dumps(contract))
        return package_directory(source, tmp_path_factory.mktemp("store"))

    return make


@pytest.fixture(scope="module")
def archive(make_archive):
    return make_archive()


@pytest.fixture(scope="module")
def home(archive, tmp_path_factory):
    """A GRADSERVE_HOME in which the archive's reference is kept, and what it was when it was answered."""
    folder = tmp_path_factory.mktemp("home")
    return folder, held_out_answers(archive, folder, folder)


def test_the_reference_is_answered_once_and_then_kept(archive, home, monkeypatch):
    folder, found = home
    assert (len(found), len(found.familiar), len(set(found.classes))) == (120, 120, 10)
    monkeypatch.setattr(ArchiveSource, "predict", None)  # asked again, this fails
    assert held_out_answers(archive, folder, folder) == found


def test_drift_is_found_against_the_images_that_training_held_out(archive, home, tmp_path):
    store = FeedbackStore(tmp_path / "feedback.db")
    store.create()
    for number in range(120):
        name = "cat" if number % 2 else "dog"
        store.add([LoggedCall(f"r{number}", time.time() - 60, "cifar10", "1.0.0", name, 0.99, True, {}, None)])
    arguments = ["drift", "--archive", str(archive), "--store", str(store.path), "--json"]
    result = CliRunner().invoke(app, arguments, env={"GRADSERVE_HOME": str(home[0])}, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert (result.exit_code, found["decision"], found["recent"], found["reference"]) == (3, "drift", 120, 120)
    assert "classes" in [row["about"] for row in found["comparisons"] if row["is_drift"]]


def test_images_that_have_changed_since_the_training_are_no_reference(make_archive, tmp_path):
    archive = make_archive(provenance=provenance() | {"data_sha256": "0" * 64})
    with pytest.raises(ControlError, match=r"not those of the training any more: compare with earlier calls"):
        held_out_answers(archive, tmp_path, tmp_path)


def test_an_archive_that_does_not_name_its_data_is_refused_with_the_remedy(make_archive, tmp_path):
    archive = make_archive(recipe=None)
    with pytest.raises(ControlError, match=r"does not say what it was trained on: compare with .*--reference earlier"):
        held_out_answers(archive, tmp_path, tmp_path)


def provenance():
    return json.loads((RELEASED / "contract.json").read_text())["accepted"]["provenance"]
