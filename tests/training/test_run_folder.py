import json

import pytest
import torch

from contracts.model import load as load_contract
from training.checkpoint import read_checkpoint
from training.errors import TrainingError
from training.parallel import ProcessGroup
from training.recipe import Recipe
from training.run_folder import FILES, locked_folder, write_run

FIRST = ProcessGroup(0, 1, torch.device("cpu"))
SECOND = ProcessGroup(1, 2, torch.device("cpu"))
RECIPE = Recipe(batch_size=16, name="colours")
FIGURES = {
    "loss": 1.0, "accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.6, "seconds": 2.0,
    "epoch_seconds": 3.0,
}  # fmt: skip


def test_before_the_first_epoch_there_is_the_checkpoint_alone(tiny_run, tmp_path):
    write_run(tiny_run(RECIPE))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_all_files_follow_from_the_run(tiny_run, tmp_path):
    run = tiny_run(RECIPE)
    run.end_epoch(FIGURES, {"python": "3.11"})
    write_run(run)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", *FILES}
    contract = load_contract(tmp_path / "contract.json")
    assert (contract.name, contract.classes) == ("colours", ("red", "green", "blue"))
    provenance = contract.accepted.provenance
    assert (provenance.training_images, provenance.held_out_images, provenance.duration_s) == (48, 12, 3.0)
    assert contract.accepted.figures.validation_accuracy == 0.6
    assert json.loads((tmp_path / "history.json").read_text()) == [FIGURES]
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    assert torch.equal(best["fc.weight"], read_checkpoint(tmp_path).best["fc.weight"])


def test_processes_other_than_the_first_write_nothing(tiny_run, tmp_path):
    run = tiny_run(RECIPE)
    run.group = SECOND
    write_run(run)
    assert not list(tmp_path.iterdir())


def test_locked_folder_keeps_a_second_training_out_until_it_is_left(tmp_path):
    folder = tmp_path / "run"
    with locked_folder(folder, FIRST, resumes=False):
        with pytest.raises(TrainingError, match="another process"), locked_folder(folder, FIRST, resumes=False):
            pass
        with locked_folder(folder, SECOND, resumes=False):  # a process of the same training
            pass
    with locked_folder(folder, FIRST, resumes=False):
        pass


def test_folder_without_a_checkpoint_cannot_be_resumed_in_and_is_not_made(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint"), locked_folder(tmp_path / "run", FIRST, resumes=True):
        pass
    assert not (tmp_path / "run").exists()


def test_folder_with_a_checkpoint_takes_no_new_training_and_is_left_unlocked(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(TrainingError, match="holds a training already"), locked_folder(tmp_path, FIRST, resumes=False):
        pass
    with locked_folder(tmp_path, FIRST, resumes=True):
        pass
