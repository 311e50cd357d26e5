import numpy as np
import pytest
from PIL import Image

from training.evaluate.calibration import Reliability
from training.evaluate.figures import Sample, draw_samples, overlay, plot_calibration, plot_confusion


def test_confusion_of_many_classes_is_drawn(tmp_path):
    classes = tuple(f"class {number}" for number in range(120))
    plot_confusion(np.eye(120, dtype=int).tolist(), classes, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert max(image.size) < 5000


def test_calibration_is_drawn_though_some_bins_have_no_image(tmp_path):
    curve = Reliability(np.array([0.0, 0.9]), np.array([0.0, 1.0]), np.array([0, 1]))
    plot_calibration({"as served": curve}, tmp_path / "calibration.png")
    with Image.open(tmp_path / "calibration.png") as image:
        assert len(image.getcolors(maxcolors=1 << 20)) > 3


def test_an_overlay_shows_the_heat_where_the_heatmap_has_it():
    pixels = np.full((8, 8, 3), 128, np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[:4, :4] = 1
    drawn = np.asarray(overlay(pixels, heat)).astype(float)
    hot, cold = drawn[:32, :32].mean((0, 1)), drawn[96:, 96:].mean((0, 1))
    assert hot.sum() > cold.sum() + 100


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_row_may_have_fewer_samples_than_the_other(tmp_path, wrong):
    sample = Sample(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32), "cat")
    draw_samples([[sample] * 3, [sample] * wrong], tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
