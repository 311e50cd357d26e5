import numpy as np
import pytest

from training.evaluate.heatmaps.measures import Measures, rounded
from training.evaluate.heatmaps.sensitivity import RandomNetworks


@pytest.fixture
def measures(network, contract, engine, images):
    """Four squares and two empty images; one square and one empty image are labelled wrongly."""
    whole = np.concatenate([images, np.zeros_like(images[:2])])
    return Measures(network, contract, engine, whole, np.array([0, 0, 0, 1, 1, 0]))


def test_the_pointing_games_are_made_of_images_that_were_answered_right(measures, images):
    scene = measures.halves
    assert scene.images.shape[1:] == images.shape[1:]
    for part, (rows, columns) in enumerate(scene.places):
        brightest = scene.images[:, :, rows, columns].max((1, 2, 3))
        np.testing.assert_array_equal(brightest, scene.classes[:, part] == 0)  # squares are bright, and class 0


def test_a_game_for_which_classes_are_missing_says_so(measures, network, contract, engine, images):
    assert measures.mosaics is None
    assert "images of 4 classes that were answered right, and there are 2" in measures.absent["quarter"]
    assert "half" not in measures.absent
    wrong = Measures(network, contract, engine, images, np.ones(4, np.intp))
    assert wrong.halves is None
    assert "images of 2 classes that were answered right, and there are 0" in wrong.absent["half"]


def test_each_measure_is_about_the_likeliest_class(measures):
    assert measures.probe.targets.tolist() == [0, 0, 0, 0, 1, 1]
    assert measures.probe.runners_up.tolist() == [1, 1, 1, 1, 0, 0]


def test_figures_of_heat_on_what_decides_are_better_than_those_of_random_heat(measures):
    measures.random = RandomNetworks((measures.network,), ())  # making the random ones takes seconds
    faithful = measures.of(lambda network, images, targets: images[:, 0])
    random = measures.of_random_heat()
    assert (faithful.quarter, faithful.quarter_peak) == (None, None)
    assert faithful.insertion - faithful.deletion > random.insertion - random.deletion + 0.1
    # The squares' heat is the same for every class; the empty images' is even, and like no other.
    assert faithful.class_correlation == pytest.approx(4 / 6, abs=1e-4)
    assert abs(random.class_correlation) < 0.2
    assert faithful.random_head_correlation == faithful.class_correlation, "this heat asks no network"


def test_figures_have_four_decimals():
    assert rounded(0.123456) == 0.1235
