"""Convolution as one matrix product, for the small maps of a network's last layers on processors.

oneDNN's bf16 kernels are made for wide maps: on one of 4×4 or less they leave most of a processor's matrix unit idle,
and the weights' gradient takes longest. Measured in `benchmarks/training_speed.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.grad import conv2d_input

_LARGEST_MAP = 4  # side of the output; at 8 the copied patches cost more than the product saves


class PatchConvolution(nn.Conv2d):
    """A 3×3 convolution with padding 1 that multiplies patches where maps are small; same state dict.

    Source: Chellapilla et al. 2006, https://inria.hal.science/inria-00112631
    """

    @classmethod
    def of(cls, layer: nn.Conv2d) -> PatchConvolution:
        """This layer with the weights of `layer`, which it shares."""
        stride = (layer.stride[0], layer.stride[1])
        own = cls(layer.in_channels, layer.out_channels, 3, stride=stride, padding=1, bias=False, device="meta")
        own.weight = layer.weight
        return own.train(layer.training)

    def forward(self, images: Tensor) -> Tensor:
        """`images` (N, C, H, W) convolved, (N, out, H', W'), in their own precision."""
        if images.dtype != torch.bfloat16 or -(-max(images.shape[2:]) // self.stride[0]) > _LARGEST_MAP:
            return super().forward(images)
        product: Tensor = _PatchProduct.apply(images, self.weight.to(torch.bfloat16), self.stride[0])  # type: ignore[no-untyped-call]
        return product


def use_patches(network: nn.Module) -> None:
    """Replaces the 3×3 convolutions in `network`, a ResNet-18, by those that multiply patches."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                setattr(module, name, PatchConvolution.of(child))


class _PatchProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, weight: Tensor, stride: int) -> Tensor:  # noqa: ANN401 - torch's
        context.save_for_backward(images, weight)
        context.stride = stride
        return _convolved(images, weight, stride)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401 - torch's
        images, weight = context.saved_tensors
        for_images = for_weight = None
        if context.needs_input_grad[0] and context.stride == 1:
            for_images = _convolved(gradient, weight.flip(2, 3).transpose(0, 1), 1)
        elif context.needs_input_grad[0]:
            for_images = conv2d_input(images.shape, weight, gradient, context.stride, 1)
        if context.needs_input_grad[1]:
            product = _rows(gradient).t() @ _patches(images, context.stride)
            for_weight = product.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return for_images, for_weight, None


def _convolved(images: Tensor, weight: Tensor, stride: int) -> Tensor:
    height, width = (-(-side // stride) for side in images.shape[2:])
    product = _patches(images, stride) @ _rows(weight).reshape(len(weight), -1).t()
    return product.view(len(images), height, width, len(weight)).permute(0, 3, 1, 2)


def _patches(images: Tensor, stride: int) -> Tensor:
    """The 3×3 patch around each place of the output, (N·H'·W', 9·C)."""
    padded = pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # (N, H', W', C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * images.shape[1])


def _rows(images: Tensor) -> Tensor:
    """(N, C, H, W) as (N·H·W, C)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
