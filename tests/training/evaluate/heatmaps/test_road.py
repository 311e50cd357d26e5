import numpy as np
import torch
from torch import nn

from training.evaluate.heatmaps.road import FEWEST, IMAGES, hotness, image_count, road


class Corner(nn.Module):
    """As sure of class 0 as the upper left quarter is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, :, :8, :8].mean((1, 2, 3))
        return self.scale * torch.stack([bright, 1 - bright], dim=1)


def test_heat_on_what_decides_is_better_than_its_contrary_and_nothing_lies_between():
    images = np.full((4, 3, 16, 16), -1, np.float32)
    images[:, :, :8, :8] = 1
    right = (images[:, 0] > 0).astype(np.float32)
    targets = np.zeros(4, np.intp)
    best, nothing, worst = (road(Corner(), images, heat, targets) for heat in (right, np.zeros_like(right), 1 - right))
    assert best > 0.2
    assert abs(nothing) < 0.1
    assert worst < -0.2


def test_pixels_of_equal_heat_have_different_places():
    places = hotness(np.array([[[0.2, 0.9], [0.0, 0.0]]], np.float32))
    assert places[0, 0].tolist() == [np.float32(2 / 3), 1]
    assert set(places[0, 1].tolist()) == {0, np.float32(1 / 3)}


def test_large_images_are_few():
    assert image_count(32, 32) == IMAGES
    assert image_count(224, 224) == FEWEST
