from dataclasses import replace

import pytest
import torch

from training.data.training_data import make_loader
from training.epoch import backward, divergence, train_epoch, train_step, validate
from training.errors import TrainingError
from training.recipe import Augmentation, Recipe
from training.run import Run

RECIPE = Recipe(
    epochs=20, batch_size=16, rate=0.3, warm_up=0.0, precision="fp32", workers=0, augmentation=Augmentation(0, 0),
    average=0.0,
)  # fmt: skip


def train_all(run: Run) -> list[dict[str, float]]:
    loader, batches = make_loader(run.data, run.recipe.augmentation, run.recipe, run.group)
    run.begin_phase()
    while not run.is_finished:
        run.end_epoch(train_epoch(run, loader, batches) | validate(run))
    return run.history


def test_epochs_lower_the_loss_and_the_held_out_images_show_it(tiny_run):
    run = tiny_run(RECIPE)
    before = validate(run)
    history = train_all(run)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["validation_loss"] < before["validation_loss"]
    assert history[-1]["validation_accuracy"] > 0.9


def test_figures_give_the_epochs_last_rate_and_its_size(tiny_run):
    history = train_all(tiny_run(replace(RECIPE, epochs=2, sizes=((0.0, 6), (0.5, 0)))))
    assert [epoch["size"] for epoch in history] == [6.0, 8.0]
    assert history[0]["rate"] > history[1]["rate"] > 0


def test_sharpness_aware_steps_begin_at_their_share_of_the_epochs(tiny_run):
    plain = train_all(tiny_run(replace(RECIPE, epochs=4)))
    sharp = train_all(tiny_run(replace(RECIPE, epochs=4, sam_radius=0.5, sam_from=0.5)))
    assert [one["loss"] == other["loss"] for one, other in zip(plain, sharp, strict=True)] == [True, True, False, False]


def test_validation_counts_each_held_out_image_once(tiny_run):
    run = tiny_run(RECIPE)
    with torch.no_grad():
        run.network.fc.weight.zero_()
        run.network.fc.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))  # always green
    assert validate(run)["validation_accuracy"] == pytest.approx(4 / 12)


def test_loss_that_is_not_finite_ends_the_training_with_a_remedy(tiny_run):
    with pytest.raises(TrainingError, match="lower --rate"):
        train_all(tiny_run(replace(RECIPE, rate=1e30)))


def test_mixed_labels_count_the_class_with_the_largest_share(tiny_run):
    run = tiny_run(RECIPE)
    with torch.no_grad():
        run.network.fc.weight.zero_()
        run.network.fc.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))  # always blue
    labels = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]])
    _, hits, seen = train_step(run, torch.randn(2, 3, 8, 8), labels, size=8, rate=0.0, radius=0.0).tolist()
    assert (hits, seen) == (1, 2)


def test_sharpness_aware_step_takes_its_gradient_at_the_worst_weights_nearby(tiny_run):
    run = tiny_run(replace(RECIPE, momentum=0.0, nesterov=False, weight_decay=0.0))
    run.network.eval()  # or the second pass would see moved statistics
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    before = [weight.detach().clone() for weight in run.network.parameters()]
    backward(run, images, labels)
    slopes = [weight.grad.clone() for weight in run.network.parameters()]
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    with torch.no_grad():
        for weight, slope in zip(run.network.parameters(), slopes, strict=True):
            weight.add_(slope, alpha=0.5 / length.item())
    run.optimiser.zero_grad()
    backward(run, images, labels)
    worst = [weight.grad.clone() for weight in run.network.parameters()]
    with torch.no_grad():
        for weight, old in zip(run.network.parameters(), before, strict=True):
            weight.copy_(old)
    train_step(run, images, labels, size=8, rate=0.1, radius=0.5)
    for weight, old, gradient in zip(run.network.parameters(), before, worst, strict=True):
        torch.testing.assert_close(weight.detach(), old - 0.1 * gradient, atol=1e-5, rtol=1e-3)
    assert not all(torch.allclose(*pair, atol=1e-4) for pair in zip(slopes, worst, strict=True))


def test_consistency_makes_the_answers_to_an_images_views_alike(tiny_run):
    def difference(consistency: float) -> float:
        run = tiny_run(replace(RECIPE, epochs=8, consistency=consistency, augmentation=Augmentation(2, 20)))
        train_all(run)
        loader, _ = make_loader(run.data, run.recipe.augmentation, replace(run.recipe, consistency=1.0), run.group)
        run.network.eval()
        with torch.inference_mode():
            views = [run.network(images.unflatten(1, (3, 3)).transpose(0, 1).flatten(0, 1)) for images, _ in loader]
            return float(torch.stack([divergence(logits.unflatten(0, (3, -1))) for logits in views]).mean())

    assert difference(12.0) < 0.8 * difference(1e-9)


def test_divergence_is_that_of_its_definition():
    answers = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()[:, None]
    mean = answers.exp().mean(0)
    wanted = sum((answer.exp() * (answer - mean.log())).sum() for answer in answers) / 3
    assert divergence(answers + 5.0) == pytest.approx(float(wanted), abs=1e-6)
    assert divergence(answers[:1].expand(3, -1, -1)) == pytest.approx(0.0, abs=1e-6)


def test_steps_that_cannot_be_recorded_here_run_plainly_and_say_so(tiny_run, caplog):
    plain = train_all(tiny_run(replace(RECIPE, epochs=2)))
    asked = train_all(tiny_run(replace(RECIPE, epochs=2, cuda_graphs=True)))
    assert [epoch["loss"] for epoch in asked] == [epoch["loss"] for epoch in plain]
    assert "--cuda-graphs needs a GPU" in caplog.text
