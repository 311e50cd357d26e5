from dataclasses import replace

import pytest
import torch

from training.data.training_data import make_loader
from training.epoch import train_epoch, validate
from training.errors import TrainingError
from training.parallel import ProcessGroup
from training.recipe import Augmentation, Cycle, Recipe
from training.run import Run

RECIPE = Recipe(
    epochs=2, batch_size=16, precision="fp32", workers=0, augmentation=Augmentation(1, 5), cycles=(Cycle(2, 0.05),)
)
FIGURES = {"validation_accuracy": 0.5, "seconds": 1.0}


def train_to(run: Run, epochs: int) -> None:
    """Train until so many epochs are done."""
    loader, batches = make_loader(run.data, run.recipe.augmentation, run.recipe, run.group)
    while len(run.history) < epochs:
        if run.epoch == 0:
            run.begin_phase()
        run.end_epoch(train_epoch(run, loader, batches) | validate(run))


@pytest.mark.parametrize("epochs", [0, 1, 2, 3])
def test_run_restored_after_any_epoch_ends_as_an_unbroken_one_bit_for_bit(tiny_run, epochs):
    whole, broken, restored = (tiny_run(RECIPE) for _ in range(3))
    train_to(whole, 4)
    train_to(broken, epochs)
    restored.restore(broken.checkpoint())
    train_to(restored, 4)
    assert whole.is_finished
    assert restored.is_finished
    for mine, wanted in ((restored.network, whole.network), (restored.averaged, whole.averaged)):
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name
    assert [figures["loss"] for figures in restored.history] == [figures["loss"] for figures in whole.history]


def test_best_weights_are_those_of_the_first_epoch_that_no_other_surpasses(tiny_run):
    run = tiny_run(RECIPE)
    for accuracy in (0.5, 0.7, 0.7):
        with torch.no_grad():
            run.kept().fc.bias.fill_(len(run.history))
        run.end_epoch(FIGURES | {"validation_accuracy": accuracy})
    assert (run.best_epoch, run.best) == (2, 0.7)
    assert run.best_weights["fc.bias"].tolist() == [1.0, 1.0, 1.0]
    assert run.duration_s == 3.0


def test_epochs_are_counted_through_the_phases(tiny_run):
    run = tiny_run(RECIPE)
    seen = []
    while not run.is_finished:
        seen.append((run.current_phase.name, run.epoch))
        run.end_epoch(FIGURES)
    assert seen == [("all", 0), ("all", 1), ("cycle 2", 0), ("cycle 2", 1)]


def test_cycle_restarts_from_the_averaged_weights_with_a_new_optimiser(tiny_run):
    run = tiny_run(RECIPE)
    train_to(run, 2)
    averaged = {name: value.clone() for name, value in run.averaged.module.state_dict().items()}
    assert not torch.equal(run.network.state_dict()["fc.weight"], averaged["fc.weight"])
    run.begin_phase()
    assert all(torch.equal(value, averaged[name]) for name, value in run.network.state_dict().items())
    assert not run.optimiser.state_dict()["state"]
    assert run.optimiser.param_groups[0]["lr"] == 0.05


def test_blend_after_a_checkpoint_of_earlier_code_is_refused(tiny_run):
    run = tiny_run(replace(RECIPE, cycles=(Cycle(1, 0.05), Cycle(1, 0.05, blend=0.5))))
    train_to(run, 3)
    run.restore(replace(run.checkpoint(), begun={}))
    with pytest.raises(TrainingError, match="nothing to blend"):
        run.begin_phase()


def test_other_data_is_refused_and_a_checkpoint_that_names_no_data_is_not(tiny_run):
    run = tiny_run(RECIPE)
    run.restore(replace(run.checkpoint(), data_sha256=None))
    with pytest.raises(TrainingError, match="not those that the training"):
        run.restore(replace(run.checkpoint(), data_sha256="00"))


def test_each_environment_is_kept_once(tiny_run):
    run = tiny_run(RECIPE)
    for python in ("3.11", "3.11", "3.12"):
        run.end_epoch(FIGURES, {"python": python})
    assert run.environments == [{"python": "3.11"}, {"python": "3.12"}]


def test_checkpoint_is_due_after_the_interval_and_at_the_end(tiny_run):
    run = tiny_run(RECIPE)
    assert run.is_checkpoint_due
    run.written_at = float("inf")
    assert not run.is_checkpoint_due
    for _ in range(4):
        run.end_epoch(FIGURES)
    assert run.is_checkpoint_due


def test_last_network_is_kept_where_the_recipe_averages_none(tiny_run):
    run, averaging = tiny_run(replace(RECIPE, average=0.0)), tiny_run(RECIPE)
    assert run.kept() is run.network
    assert averaging.kept() is averaging.averaged.module


def test_batch_that_the_processes_cannot_share_equally_is_refused(tiny_data, tmp_path):
    group = ProcessGroup(0, 3, torch.device("cpu"))
    with pytest.raises(TrainingError, match="batch of 16 cannot be parted equally among 3"):
        Run(RECIPE, tmp_path, tiny_data, torch.nn.Linear(1, 1), architecture="resnet18_small", group=group)
