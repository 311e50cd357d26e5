import numpy as np
import pytest

from training.evaluate.heatmaps.passes import random_heat
from training.evaluate.heatmaps.pointing import HALVES, MOSAICS, halves, mosaics, point

CLASSES, HEIGHT, WIDTH = 5, 6, 8


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.arange(20) % CLASSES


@pytest.fixture(scope="module")
def images(labels) -> np.ndarray:
    """Each image is as bright as its label says."""
    return np.broadcast_to(labels[:, None, None, None], (20, 3, HEIGHT, WIDTH)).astype(np.float32)


def see_the_class(_network, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return (images[:, 0] == targets[:, None, None]).astype(np.float32)


def see_all(_network, images: np.ndarray, _targets: np.ndarray) -> np.ndarray:
    return np.ones_like(images[:, 0])


def test_mosaics_are_twice_the_input_with_four_classes_each_in_its_place(images, labels):
    scene = mosaics(images, labels)
    assert scene.images.shape == (MOSAICS, 3, 2 * HEIGHT, 2 * WIDTH)
    for part, (rows, columns) in enumerate(scene.places):
        assert (scene.images[:, :, rows, columns] == scene.classes[:, part, None, None, None]).all()
    assert all(len(set(row)) == 4 for row in scene.classes.tolist())


def test_halves_are_of_the_inputs_size_and_show_the_middle_of_each_image(images, labels):
    columns = images + np.arange(WIDTH) / 100
    scene = halves(columns.astype(np.float32), labels)
    assert scene.images.shape == (HALVES, 3, HEIGHT, WIDTH)
    for part, (rows, place) in enumerate(scene.places):
        seen = scene.images[:, 0, rows, place] - scene.classes[:, part, None, None]
        np.testing.assert_allclose(seen[:, 0], np.tile(np.arange(2, 6) / 100, (HALVES, 1)), atol=1e-5)


def test_heat_on_the_class_asked_for_wins_and_heat_everywhere_has_chance(images, labels):
    for scene, chance in ((mosaics(images, labels), 0.25), (halves(images, labels), 0.5)):
        best, blind, random = (point(None, explain, scene) for explain in (see_the_class, see_all, random_heat))
        assert (best.share, best.peak) == (1, 1)
        assert blind.share == pytest.approx(chance)
        assert (random.share, random.peak) == (pytest.approx(chance, abs=0.02), pytest.approx(chance, abs=0.08))


def test_a_heatmap_without_heat_has_missed(images, labels):
    nothing = point(None, lambda network, images, targets: np.zeros_like(images[:, 0]), mosaics(images, labels))
    assert (nothing.share, nothing.peak) == (0, 0)


def test_too_few_classes_make_no_scene(images, labels):
    assert mosaics(images[labels < 3], labels[labels < 3]) is None
    assert halves(images[labels < 1], labels[labels < 1]) is None


def test_large_inputs_get_fewer_scenes(labels):
    images = np.zeros((20, 3, 65, 65), np.float32)
    assert len(mosaics(images, labels).images) == MOSAICS // 4
