import numpy as np
import pytest

from training.evaluate.heatmaps.faithfulness import STEPS, Probe, first_two, ranks


def test_a_heatmap_of_what_decides_has_the_curves_counted_by_hand(engine, images):
    """A quarter of the pixels decides: after one of eight steps half of it is gone, after two all."""
    faithful = Probe(engine, images).measure(images[:, 0])
    assert faithful.deletion == pytest.approx([1, 0.5] + [0] * (STEPS - 1))
    assert faithful.deletion_area == pytest.approx((1 / 2 + 1 / 2) / STEPS)
    assert faithful.insertion[2:] == pytest.approx([1] * (STEPS - 1))
    assert faithful.score == faithful.insertion_area - faithful.deletion_area


def test_random_order_lies_between_a_heatmap_and_its_contrary(engine, images):
    probe = Probe(engine, images)
    right, random, wrong = (result.score for result in (
        probe.measure(images[:, 0]), probe.measure_random(), probe.measure(-images[:, 0])
    ))  # fmt: skip
    assert right > random + 0.2
    assert random > wrong + 0.2
    assert probe.measure_random().deletion == pytest.approx(np.linspace(1, 0, STEPS + 1), abs=0.1)


def test_ranks_begin_at_the_hottest_pixel_and_are_random_among_equals():
    found = ranks(np.array([[[0.5, 1.0], [0.0, 0.7]], [[0, 0], [0, 1]]], np.float32))
    assert found[0].tolist() == [[2, 0], [3, 1]]
    assert found[1, 1, 1] == 0
    assert sorted(found[1].ravel()) == [0, 1, 2, 3]


def test_first_two_are_the_likeliest_classes():
    first, second = first_two(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], np.float32))
    assert (first.tolist(), second.tolist()) == ([1, 0], [2, 2])
