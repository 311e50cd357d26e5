"""`gradserve feedback`, `drift`, `labels` and `replay`: what they print, and their exit codes."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from gateway.feedback.store import Feedback, FeedbackStore, LoggedCall

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def store(tmp_path):
    store = FeedbackStore(tmp_path / "feedback.db")
    store.create()
    return store


def log(store, path, number, name, at=None):
    call = LoggedCall(f"r{number}", at or time.time(), "cifar10", "0.1.0", name, 0.99, True, {}, path.read_bytes())
    store.add([call])


@pytest.fixture
def run(store):
    def run(*arguments):
        return CliRunner().invoke(app, [*arguments, "--store", str(store.path)], catch_exceptions=False)

    return run


def test_feedback_is_shown_and_exported(store, run, tmp_path):
    for number, (name, right) in enumerate((("cat", "dog"), ("cat", "cat"), ("dog", None))):
        log(store, SAMPLES / "cat" / f"{number}.png", number, name)
        if right:
            store.put(Feedback(f"r{number}", 200.0, right, "", ""))
    assert json.loads(run("feedback", "show", "--json").stdout)["corrected"] == [["cat", "dog", 1]]
    assert "1 answers confirmed, 1 corrected" in run("feedback", "show").stdout
    result = run("feedback", "export", str(tmp_path / "out"))
    assert "2 images written" in result.stdout
    assert f"next: gradserve train --data imagefolder:{tmp_path / 'out'}" in result.stdout
    assert run("feedback", "export").exit_code == 2


def test_replay_shows_what_the_candidate_answers_differently_and_what_feedback_says(released_archive, store, run):
    for number in range(10):
        log(store, SAMPLES / "cat" / f"{number}.png", number, "cat" if number < 8 else "ship")
    store.put(Feedback("r8", 1.0, "cat", "", ""))
    found = json.loads(run("replay", "--archive", str(released_archive), "--json").stdout)
    assert (found["images"], found["failed"], found["labelled"]) == (10, 0, 1)
    assert {"r8", "r9"} <= {row["request_id"] for row in found["differences"]}
    assert (found["right_before"], found["right_now"]) == (0, 1)
    assert found["agree"] == 10 - len(found["differences"])
    assert found["agreement"][0] < found["agree"] / 10 < found["agreement"][1]


def test_a_candidate_is_named_by_its_version_or_by_its_archive(store, run):
    for arguments in ((), ("1.0.0", "--archive", "pets.mar")):
        refused = run("replay", *arguments)
        assert (refused.exit_code, "name the candidate" in refused.stderr) == (2, True)
    assert "the calls are of 0 models" in run("replay", "1.0.0").stderr


def test_drift_compares_the_calls_with_a_folder_by_the_archive(released_archive, store, run):
    for number, path in enumerate(sorted(SAMPLES.rglob("*.png")) * 2):
        log(store, path, number, "cat", at=time.time() - 60)
    result = run("drift", "--reference", str(SAMPLES), "--archive", str(released_archive), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["decision"], found["recent"], found["reference"]) == (3, "drift", 200, 100)
    (classes,) = [row for row in found["comparisons"] if row["about"] == "classes"]
    assert classes["is_drift"]
    assert classes["sentence"].startswith("cat is 100.0% of the answers")


def test_drift_against_earlier_calls_needs_enough_of_them(store, run):
    log(store, SAMPLES / "cat" / "0.png", 1, "cat")
    result = run("drift", "--reference", "earlier")
    assert result.exit_code == 4
    assert "no verdict: 1 calls against 0" in result.stdout
