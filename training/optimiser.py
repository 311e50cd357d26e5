"""The optimiser of a phase, its sharpness-aware step, and the moving average of the weights that is kept."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training.recipe import Phase, Recipe

AVERAGED_EVERY = 4  # steps: at each one it would take a thirtieth of the time, and the average would be the same

_Tensors = tuple[Tensor, ...] | list[Tensor]


def freeze(network: nn.Module, phase: Phase) -> None:
    """Put what `phase` trains into training mode; the rest keeps its weights and its batch-norm statistics."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(phase.trains(name))
    for name, module in network.named_modules():
        if not list(module.children()):
            module.train(phase.trains(name))


def make_optimiser(network: nn.Module, phase: Phase, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD for the parameters that `phase` trains; batch-norm weights and biases are not decayed.

    Source: He et al. 2018, section 3.1, https://arxiv.org/abs/1812.01187
    """
    trained = [parameter for name, parameter in network.named_parameters() if phase.trains(name)]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups,
        lr=phase.rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


@contextmanager
def at_worst_weights(network: nn.Module, radius: float) -> Iterator[None]:
    """Move the weights by `radius` along their gradients, where the loss is about the highest, and back in the end.

    Source: Foret et al. 2020, equation 2, https://arxiv.org/abs/2010.01412
    """
    slopes = [(weight, weight.grad) for weight in network.parameters() if weight.grad is not None]
    scale = radius / get_total_norm([gradient for _, gradient in slopes]).clamp_min(1e-12)
    climb = [(weight, gradient * scale) for weight, gradient in slopes]
    with torch.no_grad():
        for weight, step in climb:
            weight.add_(step)
    yield
    with torch.no_grad():
        for weight, step in climb:
            weight.sub_(step)


class AveragedNetwork(AveragedModel):
    """A copy of a network whose weights and statistics are a moving average of the network's.

    It is moved at every `AVERAGED_EVERY`-th step. `decay` is that of one step; the first steps have a lower one, to
    forget the random beginning.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, multi_avg_fn=self._move, use_buffers=True)
        self._decay = decay

    def blended(self, share: float, other: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of the averaged state dict of which `share` is taken from `other`, a state dict too."""
        return {
            key: torch.lerp(value, other[key], share) if share and value.is_floating_point() else value.clone()
            for key, value in self.module.state_dict().items()
        }

    def restart(self) -> None:
        """Forget what was averaged: the next `update_parameters` copies the network."""
        self.n_averaged.zero_()

    def _move(self, averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        steps = AVERAGED_EVERY * int(self.n_averaged)  # on the processor; reading `count` would hold a GPU up
        decay = min(self._decay, (1 + steps) / (10 + steps)) ** AVERAGED_EVERY
        get_ema_multi_avg_fn(decay)(averaged, current, count)
