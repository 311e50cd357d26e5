"""`gradserve score` where Ray is not installed; test_on_ray.py runs it with Ray."""

import sys

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from control.errors import MissingExtra


def run(*arguments):
    return CliRunner().invoke(app, ["score", *arguments], catch_exceptions=False)


@pytest.fixture
def without_ray(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


def test_help_needs_no_ray(without_ray):
    done = run("--help")
    assert done.exit_code == 0
    assert "gradserve score photos answers --evidence" in done.stdout


def test_without_ray_the_one_line_that_installs_it_is_printed(without_ray, tmp_path):
    with pytest.raises(MissingExtra, match=r"gradserve score needs ray, .*: in the clone, pip install -e '\.\[bulk\]'"):
        run(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_evidence_has_one_class(tmp_path):
    done = run(str(tmp_path), str(tmp_path / "out"), "--evidence", "--top-k", "2")
    assert done.exit_code == 2
    assert "choose one of --top-k and --evidence" in done.stderr
