from dataclasses import fields

import pytest
import torch

from contracts.model import Accepted, Ancestor
from training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_whole
from training.errors import TrainingError
from training.recipe import Recipe, recipe_to_dict

WEIGHTS = {"fc.bias": torch.tensor([1.0, 2.0])}
CHECKPOINT = Checkpoint(
    recipe=recipe_to_dict(Recipe()), phase=1, epoch=2, network=WEIGHTS, averaged=WEIGHTS, optimiser={"state": {}},
    history=[{"loss": 0.5}], run_id="ab12", data_sha256="00" * 32, best=WEIGHTS, begun=WEIGHTS,
    environments=[{"python": "3.11"}], ancestor=Ancestor("cifar10", "0.8.1", Accepted(), weights_sha256="11" * 32),
)  # fmt: skip
ADDED_LATER = {"data_sha256", "best", "begun", "environments", "ancestor"}


def test_checkpoint_survives_the_file(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path)
    read = read_checkpoint(tmp_path)
    assert torch.equal(read.best["fc.bias"], WEIGHTS["fc.bias"])
    plain = {item.name for item in fields(Checkpoint)} - {"network", "averaged", "best", "begun"}
    assert {name: getattr(read, name) for name in plain} == {name: getattr(CHECKPOINT, name) for name in plain}


def test_checkpoint_of_the_first_releases_is_read_and_what_it_lacks_is_empty(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name not in ADDED_LATER}, tmp_path / "last.pt")
    read = read_checkpoint(tmp_path)
    assert (read.epoch, read.run_id) == (2, "ab12")
    assert (read.data_sha256, read.best, read.begun, read.environments, read.ancestor) == (None, {}, {}, [], None)


def test_file_has_the_keys_of_release_0_8(tmp_path):
    """A training that began before can be resumed, and one that begins now by the code of before."""
    write_checkpoint(CHECKPOINT, tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True).keys() == {
        "recipe", "data_sha256", "phase", "epoch", "network", "averaged", "best", "begun", "optimiser", "history",
        "environments", "ancestor", "run_id",
    }  # fmt: skip


@pytest.mark.parametrize("content", [WEIGHTS, [1, 2], {"phase": 1, "epoch": 0}, {"unknown": 1}])
def test_file_that_is_no_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=r"last\.pt cannot be read .*--output"):
        read_checkpoint(tmp_path)


def test_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    write_whole(WEIGHTS, tmp_path / "best.pth")
    before = (tmp_path / "best.pth").read_bytes()
    with pytest.raises(TypeError, match="generator"):
        write_whole({"fc.bias": (number for number in range(3))}, tmp_path / "best.pth")
    assert (tmp_path / "best.pth").read_bytes() == before
