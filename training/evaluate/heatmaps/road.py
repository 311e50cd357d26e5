"""ROAD: confidence as pixels give way to a blend of their neighbours, which leaves no trace of the hole's shape.

Grey or blurred pixels are unlike any image that was learnt from, and their outline betrays the heatmap. ROAD replaces
pixels by noisy linear interpolation instead. Its figure is half of the difference between the confidence after the
coldest pixels are gone and that after as many of the hottest are, averaged over shares of pixels; random heat has 0.
Source: Rong et al. 2022, section 4, https://arxiv.org/abs/2202.00449; pytorch-grad-cam's implementation
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

# First, because it declares the ops without which torchvision, and so pytorch_grad_cam, cannot be imported.
import handlers.network  # noqa: F401

# isort: split
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

from training.evaluate.heatmaps.faithfulness import ranks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

PERCENTILES = (20, 50, 80)

IMAGES = 50
"""At most so many images of 32×32: each costs six systems of linear equations, one unknown for each removed pixel."""

FEWEST = 5


def image_count(height: int, width: int) -> int:
    """Return the number of images that `road` is measured on at this input size."""
    return max(FEWEST, min(IMAGES, IMAGES * 32 * 32 // (height * width)))


def road(
    network: nn.Module, images: NDArray[np.float32], heatmaps: NDArray[np.float32], targets: NDArray[np.intp]
) -> float:
    """Return ROAD's figure for heatmaps (N, H, W) of images (N, 3, H, W); from -1 to 1, more is better."""
    count = image_count(*images.shape[2:])
    device = next(network.parameters()).device
    metric = ROADCombined(list(PERCENTILES))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytorch-grad-cam calls NumPy's argwhere with a tensor
        torch.manual_seed(0)
        scores = metric(
            torch.from_numpy(images[:count]).to(device),
            hotness(heatmaps[:count]),
            [ClassifierOutputSoftmaxTarget(int(target)) for target in targets[:count]],
            network.eval(),
        )
    return float(np.mean(scores))


def hotness(heatmaps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each pixel's place in the order of heat, 0 to 1: among equal ones ROAD would remove all or none."""
    places: NDArray[np.float32] = (1 - ranks(heatmaps) / (heatmaps[0].size - 1)).astype(np.float32)
    return places
