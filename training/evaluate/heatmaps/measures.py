"""All measures of a heatmap method on one set of images, as the figures that the contract holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from contracts.evidence import HeatmapFigures
from training.evaluate.heatmaps.faithfulness import Probe
from training.evaluate.heatmaps.passes import random_heat
from training.evaluate.heatmaps.pointing import Scene, halves, mosaics, point
from training.evaluate.heatmaps.road import road
from training.evaluate.heatmaps.sensitivity import (
    RandomNetworks,
    class_correlation,
    randomise,
    randomised_correlations,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract
    from handlers.engines import Engine
    from training.evaluate.heatmaps.passes import Explain

CORRELATED = 100
"""Images on which class correlations are taken; the mean's standard error is then about 0.04."""

NO_RIGHT_ANSWERS = "the pointing games need images of {count} classes that were answered right, and there are {found}"


@dataclass
class Measures:
    """The measures on `images`, whose likeliest class is what heatmaps explain.

    Attributes:
        network: full precision; what heatmaps are computed on.
        contract: the version's.
        engine: the version's; its confidence is what insertion and deletion are made of.
        images: (N, 3, H, W) float32, normalised.
        labels: (N,) the right classes; images that are answered right make the pointing games' scenes.
    """

    network: nn.Module
    contract: Contract
    engine: Engine
    images: NDArray[np.float32]
    labels: NDArray[np.intp]

    def of(self, explain: Explain) -> HeatmapFigures:
        """Return the figures of a heatmap method; None where a measure needs what is not there (`absent`)."""
        probe, shown = self.probe, slice(0, CORRELATED)
        heatmaps = explain(self.network, self.images, probe.targets)
        faithful = probe.measure(heatmaps)
        quarter, quarter_peak = self._point(explain, self.mosaics)
        half, half_peak = self._point(explain, self.halves)
        head, randomised = randomised_correlations(self.network, self.random, explain, self.images, probe.targets)
        alike = class_correlation(
            self.network, explain, self.images[shown], probe.targets[shown], probe.runners_up[shown]
        )
        return HeatmapFigures(
            quarter=quarter,
            quarter_peak=quarter_peak,
            half=half,
            half_peak=half_peak,
            class_correlation=rounded(alike),
            random_head_correlation=rounded(head),
            randomised=tuple((name, rounded(value)) for name, value in randomised.items()),
            insertion=rounded(faithful.insertion_area),
            deletion=rounded(faithful.deletion_area),
            road=rounded(road(self.network, self.images, heatmaps, probe.targets)),
        )

    def of_random_heat(self) -> HeatmapFigures:
        """Return the figures of random heat: what chance reaches in each measure."""
        return self.of(random_heat)

    @cached_property
    def probe(self) -> Probe:
        """Insertion and deletion; it also holds the answers."""
        return Probe(self.engine, self.images)

    @cached_property
    def random(self) -> RandomNetworks:
        """The network with random layers."""
        return randomise(self.network, self.contract)

    @cached_property
    def mosaics(self) -> Scene | None:
        """Mosaics of four images that were answered right."""
        return mosaics(*self._right)

    @cached_property
    def halves(self) -> Scene | None:
        """Half-and-half images of images that were answered right."""
        return halves(*self._right)

    @property
    def absent(self) -> dict[str, str]:
        """The reason for each measure that cannot be made."""
        found = len(np.unique(self._right[1]))
        scenes = {"quarter": (self.mosaics, 4), "half": (self.halves, 2)}
        return {
            name: NO_RIGHT_ANSWERS.format(count=count, found=found)
            for name, (scene, count) in scenes.items()
            if scene is None
        }

    @cached_property
    def _right(self) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        right = self.probe.targets == self.labels
        return self.images[right], self.labels[right]

    def _point(self, explain: Explain, scene: Scene | None) -> tuple[float | None, float | None]:
        if scene is None:
            return None, None
        found = point(self.network, explain, scene)
        return rounded(found.share), rounded(found.peak)


def rounded(value: float) -> float:
    """Return the value as reports hold it: its sampling error is far above the fourth decimal."""
    return round(value, 4)
