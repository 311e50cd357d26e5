"""Heatmaps of the part of an image that supports a class, by pytorch-grad-cam on the full-precision network.

Grad-CAM weights each feature map `A_k` of one layer by the mean gradient of the class's logit and keeps what is
positive: `ReLU(Σ_k mean_ij(∂y_c / ∂A_k) A_k)`. Source: Selvaraju et al. 2017, equations 1 and 2,
https://arxiv.org/abs/1610.02391 The other methods weigh the same maps otherwise. Heatmaps of several layers are scaled
alike and averaged: early layers are sharp, late layers are specific to the class. A call leaves no hook, graph or
gradient behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import torch

# First, because it declares the ops without which torchvision, and so pytorch_grad_cam, cannot be imported.
import handlers.network  # noqa: F401

# isort: split
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction

from contracts.model import ContractError
from handlers.engines import thread_count
from handlers.evidence.heatmaps import FORWARD_METHODS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Explanation


class _SignedEigenCAM(EigenCAM):  # type: ignore[misc]
    """EigenCAM without the SVD's arbitrary sign: the stronger side of the first component is the salient one."""

    def get_cam_image(self, *args: Any, **_: Any) -> NDArray[np.float32]:  # noqa: ANN401 - the library's signature
        projection: NDArray[np.float32] = get_2d_projection_with_sign_correction(args[3])
        return projection


METHODS = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "layercam": LayerCAM,
    "eigencam": _SignedEigenCAM,
    "hirescam": HiResCAM,
    "xgradcam": XGradCAM,
}
"""The methods that cost one forward and at most one backward. ScoreCAM and AblationCAM cost a forward per channel."""


class Explainer:
    """Computes heatmaps on `network`; `choice` is the contract's layer and methods."""

    def __init__(self, network: nn.Module, choice: Explanation, *, device: torch.device | str) -> None:
        """Takes the network over: its parameters lose their gradients for good.

        Raises:
            ContractError: the network has no such layer, or a method is not known.
        """
        cv2.setNumThreads(thread_count())  # pytorch_grad_cam resizes with it
        self._network = network.to(device).eval().requires_grad_(requires_grad=False)
        self._device = device
        names = choice.layer.split("+")
        self._layers = [module for name, module in network.named_modules() if name in names]  # in the forward's order
        if len(self._layers) < len(names):
            raise ContractError("explain.layer", choice.layer, "a layer of the network, or several joined by +")
        known = {*METHODS, *FORWARD_METHODS}
        unknown = [method for method in (choice.method, *choice.methods) if method not in known]
        if unknown:
            raise ContractError("explain.methods", unknown[0], f"some of {', '.join(known)}")

    def heatmaps(self, images: NDArray[np.float32], targets: list[int], method: str) -> NDArray[np.float32]:
        """Return heatmaps of each image's target class, from 0 (no support) to 1 (most); one forward pass for all.

        Args:
            images: (N, 3, H, W) float32, normalised.
            targets: N class indices.
            method: a key of `METHODS`.

        Returns:
            (N, H, W) float32, each scaled to its own maximum; all 0 if nothing supports the class.
        """
        batch = torch.from_numpy(images).to(device=self._device, memory_format=torch.channels_last)
        # Before the library's own hooks: the graph begins at the first layer, so that the backward ends there too.
        leaf = self._layers[0].register_forward_hook(_start_graph)
        # Not as a context manager: its __exit__ prints and swallows an IndexError.
        cam = METHODS[method](model=self._network, target_layers=self._layers)
        try:
            with torch.set_grad_enabled(cam.uses_gradients):
                heat: NDArray[np.float32] = cam(batch, [ClassifierOutputTarget(target) for target in targets])
        finally:
            cam.activations_and_grads.release()
            leaf.remove()
        return heat


def _start_graph(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_()
