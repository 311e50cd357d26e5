"""Who answers: the named archive, else the named gateway, else the running one, else an archive of this machine."""

import json
import os
from contextlib import closing

import pytest
import typer

from control.errors import ControlError
from control.images import choice
from control.images.sources import GatewaySource
from control.stack.running import RunningStack, announce


@pytest.fixture(autouse=True)
def _own_home(monkeypatch, tmp_path):
    for name in ("GRADSERVE_KEY", "GRADSERVE_URL", "AGENT_MODEL_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_the_running_stack_answers_if_nothing_is_named(tmp_path):
    running = RunningStack(os.getpid(), "http://127.0.0.1:8123", "http://127.0.0.1:9100")
    with announce(tmp_path, running), closing(choice.choose_source(None, None, None, None)) as source:
        assert isinstance(source, GatewaySource)


def test_a_named_archive_counts_more_than_an_address(tmp_path):
    with pytest.raises(ControlError, match=r"archive x\.mar: cannot be read"):
        choice.choose_source("http://127.0.0.1:1", tmp_path / "x.mar", None, None)


def test_an_address_that_is_no_url_is_refused_with_the_form_to_write():
    with pytest.raises(ControlError, match=r"'localhost:8000' is no URL: write http://HOST:PORT"):
        choice.choose_source("localhost:8000", None, None, None)


def test_version_and_model_are_refused_for_an_archive_which_is_one_of_each(tmp_path):
    with pytest.raises(ControlError, match="an archive is one version: remove --version"):
        choice.choose_source(None, tmp_path / "x.mar", None, "1.0.0")
    with pytest.raises(ControlError, match="an archive is one model: remove --model"):
        choice.choose_source(None, tmp_path / "x.mar", None, None, "pets")


def test_names_that_stand_for_no_image_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(typer.BadParameter, match="name a file, or a folder"):
        choice.choose_images([str(tmp_path / "empty")])


def test_key_comes_from_the_file_or_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADSERVE_KEY", "of-the-environment")
    (tmp_path / "key").write_text("of-the-file\n")
    assert choice.read_key(None) == "of-the-environment"
    assert choice.read_key(tmp_path / "key") == "of-the-file"


def test_an_empty_or_missing_key_file_is_named(tmp_path):
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ControlError, match="is empty: `gradserve keys make"):
        choice.read_key(tmp_path / "key")
    with pytest.raises(ControlError, match="cannot be read"):
        choice.read_key(tmp_path / "missing")


def test_without_a_model_the_error_names_both_ways():
    with pytest.raises(ControlError, match=r"--url.*--archive"):
        choice.default_archive()


def test_the_plans_stable_version_is_the_default_archive(tmp_path):
    stable = {"version": "1.0.0", "archive": "m-1.0.0.mar", "sha256": "0" * 64, "workers": None}
    plan = {"schema": 1, "revision": 1, "model": "m", "stable": stable, "canary": None, "shadow": None, "retained": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert choice.default_archive().name == "m-1.0.0.mar"
