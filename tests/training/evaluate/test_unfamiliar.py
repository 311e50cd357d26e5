from __future__ import annotations

import numpy as np
import pytest

from training.evaluate.unfamiliar import KINDS, TILES, make_unfamiliar


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (6, 16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def made(images):
    return make_unfamiliar(images)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_number_and_size_and_changes_every_image(images, made, kind):
    assert made[kind].shape == images.shape
    assert made[kind].dtype == np.uint8
    assert (made[kind] != images).any(axis=(1, 2, 3)).all()


def test_the_same_seed_makes_the_same_images(images, made):
    again, other = make_unfamiliar(images), make_unfamiliar(images, seed=1)
    assert all((again[kind] == made[kind]).all() for kind in KINDS)
    assert (other["tiles"] != made["tiles"]).any()


def test_noise_has_each_images_own_mean():
    images = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (60, 200)])
    images[:, ::2] += 40
    made = make_unfamiliar(images)["noise"]
    assert made.mean(axis=(1, 2, 3)) == pytest.approx([80, 220], abs=4)


def test_scrambled_images_keep_their_spectrum():
    smooth = 128 + 20 * np.sin(np.arange(16) / 16 * 2 * np.pi)
    images = np.broadcast_to(smooth[None, :, None, None], (2, 16, 16, 3)).astype(np.uint8)
    before, after = (
        np.abs(np.fft.fft2(pixels[0, ..., 0])) for pixels in (images, make_unfamiliar(images)["scrambled"])
    )
    assert after[0, 0] == pytest.approx(before[0, 0], rel=0.02)
    assert after[1, 0] == pytest.approx(before[1, 0], rel=0.1)


def test_shuffled_images_hold_the_same_tiles_in_another_order(images, made):
    def tiles(pixels):
        height, width = pixels.shape[0] // TILES, pixels.shape[1] // TILES
        parts = pixels.reshape(TILES, height, TILES, width, 3).transpose(0, 2, 1, 3, 4)
        return sorted(part.tobytes() for part in parts.reshape(-1, height, width, 3))

    assert tiles(made["shuffled"][0]) == tiles(images[0])


def test_tiles_come_from_the_same_place_of_other_images(images, made):
    assert (np.sort(made["tiles"], axis=0) == np.sort(images, axis=0)).all()
