from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from training.data.training_data import make_loader
from training.epoch import optimise, train_epoch
from training.graphs import PLAIN_STEPS, CudaGraphs, RecordedSteps
from training.recipe import Augmentation, Recipe

Call = Callable[[], Tensor]
RECIPE = Recipe(
    epochs=4, batch_size=8, rate=0.1, precision="fp32", workers=0, augmentation=Augmentation(0, 0, cutmix=0.5),
    sizes=((0.0, 6), (0.5, 0)), sam_radius=0.1, sam_from=0.5,
)  # fmt: skip


class Repeats:
    """A recorder for processors: what it records is the call itself, which reads the same buffers again."""

    def __init__(self, *, fails: bool = False) -> None:
        self.recorded = self.plain = 0
        self.fails = fails

    def warm_up(self, call: Call) -> Tensor:
        self.plain += 1
        return call()

    def record(self, call: Call) -> Call:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.recorded += 1
        return call


def trained(run, recorder=None) -> list[float]:
    """Train the run and return the losses of its epochs."""
    loader, batches = make_loader(run.data, run.recipe.augmentation, run.recipe, run.group)
    run.begin_phase()
    if recorder:
        run.recorded_steps = RecordedSteps(partial(optimise, run), run.optimiser, recorder)
    losses = []
    while not run.is_finished:
        figures = train_epoch(run, loader, batches)
        losses.append(figures["loss"])
        run.end_epoch(figures | {"validation_accuracy": 0.0})
    return losses


def test_recorded_steps_have_the_losses_of_plain_ones(tiny_run):
    recorder = Repeats()
    assert trained(tiny_run(RECIPE), recorder) == pytest.approx(trained(tiny_run(RECIPE)), rel=1e-6)
    assert recorder.recorded == 4  # two sizes, the second with sharpness-aware steps; labels with and without shares
    assert recorder.plain == 4 * PLAIN_STEPS


def test_a_step_that_cannot_be_recorded_is_logged_once_and_all_run_plainly(tiny_run, caplog):
    recorder = Repeats(fails=True)
    assert trained(tiny_run(RECIPE), recorder) == pytest.approx(trained(tiny_run(RECIPE)), rel=1e-6)
    assert recorder.plain == 4 * 6
    assert caplog.text.count("operation not permitted when stream is capturing): they run plainly") == 1


def test_rate_is_a_tensor_that_each_step_fills(tiny_run):
    run = tiny_run(replace(RECIPE, sam_radius=0.0))
    steps = RecordedSteps(partial(optimise, run), run.optimiser, Repeats())
    before = run.network.fc.weight.detach().clone()
    steps(torch.randn(8, 3, 8, 8), torch.arange(8) % 3, rate=0.0, radius=0.0)
    assert torch.equal(run.network.fc.weight, before)
    steps(torch.randn(8, 3, 8, 8), torch.arange(8) % 3, rate=0.5, radius=0.0)
    assert not torch.equal(run.network.fc.weight, before)
    assert [float(group["lr"]) for group in run.optimiser.param_groups] == [0.5, 0.5]


def test_checkpoint_of_recorded_steps_is_continued_by_plain_ones(tiny_run):
    run, other = tiny_run(RECIPE), tiny_run(RECIPE)
    trained(run, Repeats())
    run.phase, run.epoch = 0, 1  # as if it had been cut off there
    run.history = run.history[:1]
    other.restore(run.checkpoint())
    loader, batches = make_loader(other.data, RECIPE.augmentation, RECIPE, other.group)
    assert train_epoch(other, loader, batches)["loss"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_graphs_have_the_losses_of_plain_steps(tiny_run):
    recipe = replace(RECIPE, epochs=8)
    assert trained(tiny_run(recipe), CudaGraphs()) == pytest.approx(trained(tiny_run(recipe)), rel=1e-3)
