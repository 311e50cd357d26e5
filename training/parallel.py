"""Data parallel training: what one process does together with the others that `torchrun` started.

Each process takes its part of every batch and the gradients are averaged (torch's DistributedDataParallel). Batch-norm
statistics are taken over the whole batch: the result is that of one process, to the rounding of sums. A training in one
process goes the same way, as a team of one.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one training, seen from process `rank`, which computes on `device`."""

    rank: int
    processes: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Return True if this is the process that writes checkpoints, records and shows progress."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' `values`."""
        if self.processes > 1:
            distributed.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:  # noqa: ANN401 - whatever it is, it comes back
        """Return the first process's `value`."""
        if self.processes == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def share_statistics(self, network: nn.Module) -> nn.Module:
        """The network with batch-norm layers that normalise by the statistics of the whole batch; same state dict."""
        if self.processes == 1:
            return network
        if self.device.type == "cuda":
            converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return converted
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, WholeBatchNorm.of(child))
        return network

    def average_gradients(self, network: nn.Module) -> nn.Module:
        """The network to call in training: after `backward`, every process holds the average of all gradients."""
        if self.processes == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        # Buffers are equal without being sent: whole-batch statistics are.
        return DistributedDataParallel(
            network, device_ids=[self.device] if self.device.type == "cuda" else None, forward_sync_buffers=False
        )


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """This process's team: those that `torchrun` started (nccl on GPUs, gloo on processors), or itself alone."""
    processes, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if processes == 1:
        yield ProcessGroup(0, 1, device)
        return
    if has_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if has_gpu else "gloo")
    try:
        yield ProcessGroup(distributed.get_rank(), processes, device)
    finally:
        distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over all processes, differentiable: a value's gradient is the sum of theirs."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' images, which hold equally many.

    torch's SyncBatchNorm does this on GPUs only. Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> WholeBatchNorm:
        """This layer with the weights and statistics of `layer`."""
        own = cls(layer.num_features, layer.eps, layer.momentum)
        own.load_state_dict(layer.state_dict())
        return own.train(layer.training)

    def forward(self, images: Tensor) -> Tensor:
        """`images` (N, C, H, W) normalised, in their own precision; moves the running statistics in training."""
        if not self.training:
            return super().forward(images)
        values = images.float()
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        processes = distributed.get_world_size()
        # In double precision, or the difference of the two squares would lose digits.
        squares = variance.double() + mean.double().square()
        moments: Tensor = _Sum.apply(torch.stack((mean.double(), squares))) / processes  # type: ignore[no-untyped-call]
        mean, variance = moments[0], moments[1] - moments[0].square()
        self._move_statistics(mean.detach(), variance.detach(), processes * values.numel() // values.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        column = (1, -1, 1, 1)
        normalised = torch.addcmul(shift.float().view(column), values, scale.float().view(column))
        return normalised.to(images.dtype)

    def _move_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None  # noqa: PT018, S101 - for the type checker
        momentum = self.momentum or 0.0
        self.running_mean.lerp_(mean.float(), momentum)
        self.running_var.lerp_((variance * count / (count - 1)).float(), momentum)
        self.num_batches_tracked += 1
