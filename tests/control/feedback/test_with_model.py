"""Labels, replay and drift with the released model and this repository's samples."""

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control.archive import inspect_archive
from control.cli.main import app
from control.errors import ControlError, FeedbackUnusable
from control.feedback.labels import find_wrong_labels, in_folder
from control.images.archive_source import ArchiveSource
from gateway.feedback.store import Feedback, FeedbackStore, LoggedCall

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def source(released_archive):
    with closing(ArchiveSource(released_archive)) as source:
        yield source


@pytest.fixture
def mislabelled(tmp_path):
    """A folder of the samples in which four images lie in the folder of another class."""
    for path in sorted(SAMPLES.rglob("*.png")):
        target = tmp_path / "photos" / path.parent.name / f"{path.parent.name}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    moved = []
    for name, other in (("cat", "ship"), ("frog", "truck"), ("horse", "bird"), ("ship", "dog")):
        path = tmp_path / "photos" / other / f"{name}-0.png"
        (tmp_path / "photos" / name / path.name).rename(path)
        moved.append(path)
    return tmp_path / "photos", moved


@pytest.fixture
def store(tmp_path):
    store = FeedbackStore(tmp_path / "feedback.db")
    store.create()
    return store


def log(store, path, number, name, at=None):
    call = LoggedCall(f"r{number}", at or time.time(), "cifar10", "0.1.0", name, 0.99, True, {}, path.read_bytes())
    store.add([call])


def test_planted_wrong_labels_are_found(released_archive, source, mislabelled):
    folder, moved = mislabelled
    classes = inspect_archive(released_archive).contract.classes
    found = find_wrong_labels(in_folder(folder), classes, source, lambda: None)
    assert found.images == 100
    assert {str(path) for path in moved} <= {suspect.name for suspect in found.suspects}
    assert len(found.suspects) <= 8
    by_name = {suspect.name: suspect for suspect in found.suspects}
    assert (by_name[str(moved[0])].label, by_name[str(moved[0])].likely) == ("ship", "cat")


def test_a_label_that_is_no_class_of_the_model_is_refused(source, tmp_path):
    (tmp_path / "unicorn").mkdir()
    (tmp_path / "unicorn" / "1.png").write_bytes(b"x")
    with pytest.raises(ControlError, match="no class unicorn"):
        find_wrong_labels(in_folder(tmp_path), ("cat", "dog"), source, lambda: None)


def test_replay_shows_what_the_candidate_answers_differently_and_what_feedback_says(released_archive, store):
    for number in range(10):
        log(store, SAMPLES / "cat" / f"{number}.png", number, "cat" if number < 8 else "ship")
    store.put(Feedback("r8", 1.0, "cat", "", ""))
    arguments = ["replay", "--archive", str(released_archive), "--store", str(store.path), "--json"]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert (found["images"], found["failed"], found["labelled"]) == (10, 0, 1)
    assert {"r8", "r9"} <= {row["request_id"] for row in found["differences"]}
    assert (found["right_before"], found["right_now"]) == (0, 1)
    assert found["agree"] == 10 - len(found["differences"])
    assert found["agreement"][0] < found["agree"] / 10 < found["agreement"][1]


def test_replay_without_images_names_the_setting(released_archive, store):
    with pytest.raises(FeedbackUnusable, match="GATEWAY_FEEDBACK_SAMPLE"):
        CliRunner().invoke(
            app, ["replay", "--archive", str(released_archive), "--store", str(store.path)], catch_exceptions=False
        )


def test_drift_compares_the_calls_with_a_folder_by_the_archive(released_archive, store, tmp_path):
    for number, path in enumerate(sorted(SAMPLES.rglob("*.png")) * 2):
        log(store, path, number, "cat", at=time.time() - 60)
    arguments = ["drift", "--reference", str(SAMPLES), "--archive", str(released_archive), "--store", str(store.path)]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert (result.exit_code, found["decision"], found["recent"], found["reference"]) == (3, "drift", 200, 100)
    (classes,) = [row for row in found["comparisons"] if row["about"] == "classes"]
    assert classes["is_drift"]
    assert classes["sentence"].startswith("cat is 100.0% of the answers")


def test_drift_against_earlier_calls_needs_enough_of_them(store):
    log(store, SAMPLES / "cat" / "0.png", 1, "cat")
    result = CliRunner().invoke(
        app, ["drift", "--reference", "earlier", "--store", str(store.path)], catch_exceptions=False
    )
    assert result.exit_code == 4
    assert "no verdict: 1 calls against 0" in result.stdout
