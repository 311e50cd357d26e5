from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from contracts import wire
from handlers.overlay import draw_overlay, overlay_size, stretch


def drawn(image, heatmap, size, alpha=0.5) -> np.ndarray:
    """The overlay's pixels, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(draw_overlay(image, heatmap, size=size, alpha=alpha)))).astype(float)


def lightness(pixels: np.ndarray) -> np.ndarray:
    """L* of CIELAB, 0 to 100. Source: CIE 15:2004."""
    linear = np.where(pixels / 255 <= 0.04045, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return 116 * np.where(y > 0.008856, np.cbrt(y), 7.787 * y + 16 / 116) - 16


@pytest.mark.parametrize(
    ("image", "asked", "size"),
    [
        ((32, 32), None, (32, 32)),
        ((4000, 3000), None, (1024, 768)),
        ((4000, 3000), 200, (200, 150)),
        ((4000, 3), None, (1024, 1)),
        ((30, 40), 400, (300, 400)),
        ((1, 1), None, (1, 1)),
    ],
)
def test_the_overlay_has_the_images_proportions(image, asked, size):
    assert overlay_size(image, asked) == size


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (24, 16), (1024, 341)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_heat_in_a_corner_is_drawn_in_that_corner(size, corner):
    heatmap = np.zeros((16, 24), dtype=np.float32)
    rows, columns = (slice(0, 4), slice(12, 16))[corner[0]], (slice(0, 6), slice(18, 24))[corner[1]]
    heatmap[rows, columns] = 1
    heat = stretch(heatmap, size)
    assert heat.shape == (size[1], size[0])
    ys, xs = np.nonzero(heat > 0.5)
    width, height = size
    expected = (
        width * columns.start / 24,
        width * columns.stop / 24,
        height * rows.start / 16,
        height * rows.stop / 16,
    )
    np.testing.assert_allclose((xs.min(), xs.max() + 1, ys.min(), ys.max() + 1), expected, atol=1.01)


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_heat_is_legible_on_dark_and_light_images(grey):
    """Hot and cold differ by at least a quarter of the whole scale from black to white, evenly in between."""
    heatmap = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (8, 1))
    light = lightness(drawn(Image.new("RGB", (64, 8), (grey,) * 3), heatmap, (64, 8)))[4]
    assert light[-1] - light[0] > 25
    assert (np.diff(light[::8]) > 0).all()


def test_alpha_goes_from_the_image_to_the_heatmap(noise):
    image = Image.fromarray(noise)
    heatmap = np.zeros((16, 24), dtype=np.float32)
    assert (drawn(image, heatmap, image.size, alpha=0) == noise).all()
    assert drawn(image, heatmap, image.size, alpha=1).std() == pytest.approx(0, abs=2)


def test_the_largest_overlay_of_noise_stays_below_torchserves_limit():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8))
    heatmap = rng.random((32, 32), dtype=np.float32)
    assert len(draw_overlay(image, heatmap, size=(1024, 1024), alpha=0.01)) < wire.MAX_ANSWER_BYTES


def test_the_gateway_reads_what_an_overlay_tells_of_itself():
    image, heatmap = Image.new("RGB", (8, 8)), np.ones((2, 2), dtype=np.float32)
    shown = wire.dump_heatmap(1, 1, b"\xff")
    entry = wire.dump_evidence(("café", 0.5), target=("thé", 0.25), method="gradcam", strength=1.0, heatmap=shown)
    about = wire.dump_about(entry, "drinks", "1.0.0")
    overlay = draw_overlay(image, heatmap, size=(8, 8), alpha=0.5, about=about)
    del entry["heatmap"]
    assert wire.parse_about(overlay) == {**entry, "model": {"name": "drinks", "version": "1.0.0"}}
    assert Image.open(io.BytesIO(overlay)).text == {"gradserve": about}
    assert wire.parse_about(draw_overlay(image, heatmap, size=(8, 8), alpha=0.5)) == {}
