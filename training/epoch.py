"""One epoch of a training: its steps on the training images, then the validation on the held-out ones."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from training.errors import TrainingError
from training.evaluate.inference import compute_logits
from training.graphs import CudaGraphs, RecordedSteps
from training.optimiser import AVERAGED_EVERY, at_worst_weights, freeze
from training.recipe import rate_factor

if TYPE_CHECKING:
    from training.data.augment import EpochBatches
    from training.data.training_data import Loader
    from training.run import Run


def train_epoch(run: Run, loader: Loader, batches: EpochBatches) -> dict[str, float]:
    """Train one epoch and return its figures: loss, accuracy, seconds, images per second, rate, image size.

    Raises:
        TrainingError: the loss is not finite.
    """
    phase, recipe = run.current_phase, run.recipe
    freeze(run.network, phase)  # the validation put all into evaluation mode
    if run.records_steps and run.recorded_steps is None:
        run.recorded_steps = RecordedSteps(partial(optimise, run), run.optimiser, CudaGraphs())
    batches.epoch = len(run.history)
    size = phase.image_size(run.epoch) or run.data.input.height
    radius = recipe.sam_radius if run.epoch / phase.epochs >= recipe.sam_from else 0.0
    steps = len(batches) * phase.epochs
    started = shown = time.perf_counter()
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)  # of losses, hits and images
    rate = 0.0
    title = f"{phase.name} {run.epoch + 1}/{phase.epochs} {size}px"
    with tqdm(loader, desc=title, mininterval=1.0, disable=not run.group.is_first) as bar:
        for index, (images, labels) in enumerate(bar):
            rate = phase.rate * rate_factor(run.epoch * len(batches) + index, steps, phase.warm_up)
            sums += train_step(run, images, labels, size=size, rate=rate, radius=radius)
            if recipe.average and ((index + 1) % AVERAGED_EVERY == 0 or index + 1 == len(batches)):
                run.averaged.update_parameters(run.network)
            if (now := time.perf_counter()) > shown + 1:  # to read them at each step would hold a GPU up
                shown = now
                bar.set_postfix(_postfix(sums, run.group.processes / (now - started)), refresh=False)
    loss, accuracy, seen = _means(run.group.total(sums))
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss}: lower --rate (it was {phase.rate}) or lengthen the warm-up")
    seconds = time.perf_counter() - started
    return {
        "loss": loss,
        "accuracy": accuracy,
        "seconds": seconds,
        "images_per_s": seen / seconds,
        "rate": rate,
        "size": float(size),
    }


def train_step(run: Run, images: Tensor, labels: Tensor, *, size: int, rate: float, radius: float) -> Tensor:
    """Train on one batch and return its sums of losses, hits and images, (3,).

    Args:
        run: the training.
        images: (N, 3, H, W) float32, normalised, or several views of each image, one after the other, as
            (N, 3·views, H, W); they are resampled to `size`.
        labels: (N,) int64, or (N, classes) float32 shares.
        size: height and width in pixels that the network gets.
        rate: the learning rate.
        radius: of the sharpness-aware step; 0 takes a plain one.
    """
    images = images.to(run.device, non_blocking=True)
    labels = labels.to(run.device, non_blocking=True)
    if images.shape[-1] != size:
        images = interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    if run.recipe.views > 1:
        images = images.unflatten(1, (run.recipe.views, -1)).transpose(0, 1).flatten(0, 1)
    images = images.contiguous(memory_format=torch.channels_last)
    if run.recorded_steps is not None:
        return run.recorded_steps(images, labels, rate=rate, radius=radius)
    for parameters in run.optimiser.param_groups:
        parameters["lr"] = rate
    return optimise(run, images, labels, radius)


def optimise(run: Run, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Move the weights by one step at the optimiser's rate, and return the sums as `train_step` does.

    Args:
        run: the training.
        images: (views·N, 3, H, W) on the device: the first view of all N images, then the next one.
        labels: as in `train_step`, on the device.
        radius: as in `train_step`.
    """
    run.optimiser.zero_grad(set_to_none=True)
    loss, logits = backward(run, images, labels)
    if radius:
        with at_worst_weights(run.network, radius):
            run.optimiser.zero_grad(set_to_none=True)
            backward(run, images, labels)
    run.optimiser.step()
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    hits = (logits.argmax(1) == classes).sum()
    return torch.stack([loss * len(labels), hits, torch.full_like(hits, len(labels))])


def backward(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of one batch, and return its loss, and its logits of the first view."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        logits = run.trained_network(images)
    views = logits.float().split(len(labels))
    loss = cross_entropy(views[0], labels, label_smoothing=run.recipe.label_smoothing)
    if len(views) > 1:
        loss = loss + run.recipe.consistency * divergence(torch.stack(views))
    loss.backward()
    return loss.detach(), views[0].detach()


def divergence(logits: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence of the answers to each image's views, from logits (views, N, K).

    Source: Hendrycks et al. 2019, section 3, https://arxiv.org/abs/1912.02781
    """
    logs = logits.log_softmax(2)
    mean = logs.exp().mean(0).clamp_min(1e-7).log()
    return (logs.exp() * (logs - mean)).sum(2).mean()


def validate(run: Run) -> dict[str, float]:
    """Return loss and accuracy of the kept weights on the held-out images, at the contract's size.

    Each process computes its part of them.
    """
    logits = compute_logits(run.kept(), run.held_out_batches(), device=run.device, bf16=run.bf16)
    labels = torch.from_numpy(run.data.held_out.labels[run.held_out_part])
    loss = cross_entropy(logits, labels, reduction="sum")
    hits = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss.double(), hits.double(), torch.tensor(float(len(labels)))])
    mean_loss, accuracy, _ = _means(run.group.total(sums.to(run.device)))
    return {"validation_loss": mean_loss, "validation_accuracy": accuracy}


def _means(sums: Tensor) -> tuple[float, float, float]:
    """Return the mean loss, the share of hits and the number of images."""
    loss, hits, seen = sums.tolist()
    return loss / seen, hits / seen, seen


def _postfix(sums: Tensor, per_s: float) -> dict[str, str]:
    loss, accuracy, seen = _means(sums)
    return {"loss": f"{loss:.3f}", "acc": f"{accuracy:.3f}", "img_s": f"{seen * per_s:.0f}"}
