"""`gradserve prune`: what it prints, removes, notes in the audit log, and exits with."""

import json
import os
import time

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from control.errors import PlanUnusable


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("AGENT_", "GRADSERVE_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def training(tmp_path):
    """The folder of a training that nothing refers to, of 3 MB and 90 days old."""
    folder = tmp_path / ".gradserve" / "training" / "old"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes(bytes(3_000_000))
    then = time.time() - 90 * 86_400
    for path in (folder / "last.pt", folder):
        os.utime(path, (then, then))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["prune", *arguments], catch_exceptions=False)


def audit(tmp_path):
    return [json.loads(line) for line in (tmp_path / ".gradserve" / "audit.jsonl").read_text().splitlines()]


def test_without_yes_nothing_is_removed_and_the_command_that_does_is_named(training, tmp_path):
    shown = run("--days", "60")
    assert (shown.exit_code, training.exists()) == (0, True)
    assert "3.0 MB can be removed: gradserve prune --days 60 --yes" in shown.stdout
    found = json.loads(run("--json").stdout)
    assert (found["bytes"], found["removed"]) == (3_000_000, False)
    assert [row["kind"] for row in found["unused"]] == ["run"]
    assert not (tmp_path / ".gradserve" / "audit.jsonl").exists()


def test_what_was_removed_is_noted_in_the_audit_log(training, tmp_path):
    assert json.loads(run("--yes", "--json").stdout)["removed"] is True
    assert not training.exists()
    (line,) = audit(tmp_path)
    assert (line["what"], line["failed"]) == ("prune", [])
    assert [name.rpartition("/")[2] for name in line["removed"]] == ["old"]


def test_a_training_that_cannot_be_removed_is_named_and_not_noted_as_removed(training, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(f"{path} is locked")

    monkeypatch.setattr("shutil.rmtree", refuse)
    result = run("--yes")
    assert (result.exit_code, "could not be removed completely" in result.stderr) == (1, True)
    (line,) = audit(tmp_path)
    assert line["removed"] == []
    assert "is locked" in line["failed"][0]


def test_nothing_is_removed_if_the_plan_cannot_be_read(training, tmp_path):
    (tmp_path / ".gradserve" / "plan.json").write_text("{")
    with pytest.raises(PlanUnusable, match="cannot be used"):
        run("--yes")
    assert training.exists()
