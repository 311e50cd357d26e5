"""Training in two real processes under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
# A rate at which rounding does not grow: two runs of one process with other sums part company at 0.1.
RECIPE = f"""
data = "imagefolder:{ROOT}/tests/samples"
pretrained = "start/best.pth"
head_epochs = 1
head_rate = 0.01
epochs = 2
rate = 0.01
unfreeze = ["all"]
batch_size = 16
sizes = [[0.0, 16]]
precision = "fp32"
workers = 0
[augmentation]
operations = 1
magnitude = 5
erasing = 0.2
[[cycles]]
epochs = 1
rate = 0.005
sizes = [[0.0, 16]]
"""
CURVE = ("loss", "accuracy", "validation_loss", "validation_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a recipe, a network to begin with, and the runs that the tests compare."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "recipe.toml").write_text(RECIPE)
    gradserve(folder, 1, "--data", f"imagefolder:{ROOT}/tests/samples", "--epochs", "1", "--output", "start")
    for processes in (1, 2):
        gradserve(folder, processes, "--config", "recipe.toml", "--output", str(processes))
    return folder


def command(processes: int, *options: str) -> list[str]:
    alone = [sys.executable, "-m", "control.cli.main"]
    team = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*(alone if processes == 1 else [*team, "-m", "control.cli.main"]), "train", *options]


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GRADSERVE_DATA": str(folder / "cache"),
    }


def gradserve(folder: Path, processes: int, *options: str) -> str:
    done = subprocess.run(
        command(processes, *options), cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def history(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "history.json").read_text())


def test_two_processes_have_the_loss_curve_of_one(folder):
    one, two = history(folder / "1"), history(folder / "2")
    assert len(one) == 4
    for alone, together in zip(one, two, strict=True):
        for name in CURVE:
            assert together[name] == pytest.approx(alone[name], abs=1e-4), name
    for part in ("network", "averaged"):
        assert distance(folder / "1", folder / "2", part) < 1e-4


def distance(one: Path, other: Path, part: str) -> float:
    """How far apart two runs' tensors lie, as a share of their length."""
    states = [torch.load(run / "last.pt", weights_only=True)[part].values() for run in (one, other)]
    vectors = [torch.cat([tensor.double().flatten() for tensor in state]) for state in states]
    return float((vectors[0] - vectors[1]).norm() / vectors[0].norm())


def test_only_the_first_process_speaks(folder):
    said = gradserve(folder, 2, "--config", "recipe.toml", "--epochs", "1", "--output", "said")
    assert said.count("best held-out accuracy") == 1


def test_killed_processes_resume_to_the_weights_of_unbroken_ones(folder):
    killed = folder / "killed"
    process = subprocess.Popen(
        command(2, "--config", "recipe.toml", "--output", "killed"),
        cwd=folder,
        env=environment(folder),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "curves.png").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # torchrun gives each process a session of its own: one that lived on would train to the end.
    trainers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(trainers) == 2
    for pid in (process.pid, *map(int, trainers)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(torch.load(killed / "last.pt", weights_only=True)["history"]) < 4
    gradserve(folder, 2, "--resume", "killed")
    states = [torch.load(path / "last.pt", weights_only=True) for path in (folder / "2", killed)]
    for part in ("network", "averaged"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name


def test_batch_that_cannot_be_parted_is_refused(folder):
    done = subprocess.run(
        command(2, "--config", "recipe.toml", "--batch-size", "15", "--output", "odd"),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "a batch of 15 cannot be parted equally among 2 processes" in done.stderr
