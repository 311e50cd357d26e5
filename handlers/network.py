"""The network's architectures by name: built the same way by training, evaluation and the serving worker.

Parameter names are torchvision's, so that its ImageNet weights load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# PyPI's torchvision is compiled against CUDA; beside a CPU-only torch its compiled ops do not load, and `import torchvision`
# fails where it registers fake versions of these two. Declaring their schemas first is enough (nothing here calls them);
# the library object must stay alive. Where the ops do load, nothing is declared.
# See https://github.com/pytorch/vision/issues/8985
_ops: torch.library.Library | None = None
if not torch.cuda.is_available() and torch.version.cuda is None:
    _ops = torch.library.Library("torchvision", "DEF")
    _ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision.models import ResNet, resnet18  # noqa: E402 - needs the declarations above


def build_network(architecture: str, classes: int) -> ResNet:
    """An untrained network of the named architecture with `classes` outputs.

    `resnet18` is torchvision's, for pictures of about 224 pixels. `resnet18_small` has a 3×3 stem of stride 1 and no
    max-pool, for pictures of about 32 to 64 pixels (He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385).

    Raises:
        ValueError: the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: use one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](classes)


def _resnet18(classes: int) -> ResNet:
    network: ResNet = resnet18(weights=None, num_classes=classes)
    return network


def _resnet18_small(classes: int) -> ResNet:
    network = _resnet18(classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


ARCHITECTURES: dict[str, Callable[[int], ResNet]] = {"resnet18": _resnet18, "resnet18_small": _resnet18_small}
