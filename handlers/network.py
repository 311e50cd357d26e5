"""The network's architectures by name: built the same way by training, evaluation and the serving worker.

Parameter names are torchvision's, so that its ImageNet weights load.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


def _declare_missing_ops() -> torch.library.Library | None:
    """Declares the two compiled torchvision ops whose fakes `import torchvision` registers, where they do not load.

    PyPI's torchvision is built against CUDA: beside a CPU-only torch its compiled ops do not load and the import fails.
    Nothing here calls them, so their schemas are enough. The library object that is returned must stay alive.
    See https://github.com/pytorch/vision/issues/9085
    """
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return None  # the import below says so
    try:
        torch.ops.load_library(str(Path(package.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_OPS = _declare_missing_ops()

from torchvision.models import ResNet, resnet18  # noqa: E402 - after the declarations above


def build_network(architecture: str, classes: int) -> ResNet:
    """An untrained network of the named architecture with `classes` outputs.

    `resnet18` is torchvision's, for images of about 224 pixels. `resnet18_small` has a 3×3 stem of stride 1 and no
    max-pool, for images of about 32 to 64 pixels (He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385).

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
