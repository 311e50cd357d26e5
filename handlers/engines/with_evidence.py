"""A network that gives, beside its logits, what evidence is made of. Written once for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = ("logits", "features", "maps", "sharpness")
"""Names of the outputs of `WithEvidence`, and of the graph that is made from it."""


class WithEvidence(nn.Module):
    """Runs `network` and returns logits, pooled features, class maps and sharpness (see `handlers.engines.Outputs`).

    The network is one that `gives_evidence`.
    """

    def __init__(self, network: nn.Module, sharp_layer: str) -> None:
        """Share the network's weights; `sharp_layer` is one of its children."""
        super().__init__()
        self.network = network
        self._sharp_layer = sharp_layer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits (N, K), features (N, D), maps (N, K, h, w) and sharpness (N, h', w')."""
        *layers, (_, pool), (_, head) = self.network.named_children()
        activations = sharp = images
        for name, layer in layers:
            activations = layer(activations)
            if name == self._sharp_layer:
                sharp = activations
        features = pool(activations).flatten(1)
        weights = head.get_parameter("weight").float()[:, :, None, None]
        maps = nn.functional.conv2d(activations.float(), weights)
        return head(features), features, maps, sharp.float().square().mean(1).sqrt()


def gives_evidence(network: nn.Module, sharp_layer: str | None) -> bool:
    """Return True if the network is its children in a row, the last two a global mean and one linear head.

    All of handlers/network.py are. Another network's class maps have no closed form.
    """
    names = [name for name, _ in network.named_children()]
    last = [*network.children()][-2:]
    return (
        sharp_layer in names[:-2]
        and isinstance(last[0], nn.AdaptiveAvgPool2d)
        and last[0].output_size in (1, (1, 1))
        and isinstance(last[1], nn.Linear)
    )
