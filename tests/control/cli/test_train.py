import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from control.cli.train import _name_of
from control.errors import ControlError


@pytest.mark.parametrize(
    ("folder", "name"), [("pets", "pets"), ("my pets/", "my-pets"), ("../Été 2026", "t-2026"), ("…", "images")]
)
def test_the_model_of_an_image_folder_is_named_after_the_folder(folder, name):
    assert _name_of(Path(folder)) == name


def test_a_resumed_training_refuses_another_folder(tmp_path):
    done = CliRunner().invoke(app, ["train", "--resume", str(tmp_path), "--output", str(tmp_path / "other")])
    assert isinstance(done.exception, ControlError)
    assert "remove --output" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "imagenet"], "unknown data 'imagenet'"),
        (["--data", "imagefolder:nowhere"], "nowhere is not there"),
        (["--precision", "bf61"], "not 'bf61'"),
        (["--architecture", "resnet81"], "not 'resnet81'"),
        (["--resume", "nowhere"], "holds no checkpoint"),
    ],
)
def test_a_wrong_option_is_refused_before_torch_is_imported_and_resuming_is_not_suggested(arguments, reason, tmp_path):
    code = (
        "import atexit, sys; from control.cli.main import main; "
        "atexit.register(lambda: print('loaded torch' if 'torch' in sys.modules else 'quick')); main()"
    )
    command = [sys.executable, "-c", code, "train", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "quick\n")
    assert reason in done.stderr
    assert "if it is cut off" not in done.stderr
    assert not [*tmp_path.iterdir()]


def test_help_shows_the_usual_names_of_hyper_parameters():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    for name in ("--lr", "--head-lr", "--num-workers", "--architecture", "--batch-size"):
        assert f"{name} " in shown or f"{name}," in shown, name


def test_version_is_the_version_of_the_project():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    (printed,) = CliRunner().invoke(app, ["--version"]).stdout.splitlines()
    assert f'version = "{printed.removeprefix("gradserve ")}"' in project
