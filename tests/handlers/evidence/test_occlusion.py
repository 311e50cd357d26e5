from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from handlers.engines import Outputs
from handlers.evidence.occlusion import BLUR, blur, hottest, keep_and_remove, verdict


class LeftHalf:
    """Answers class 1 as far as the left half of the image is striped."""

    def run(self, images):
        striped = np.abs(np.diff(images[..., : images.shape[-1] // 2], axis=-1)).mean(axis=(1, 2, 3))
        confidence = np.clip(striped / 2, 0, 1).astype(np.float32)
        return Outputs(np.stack([1 - confidence, confidence], axis=1))


def stripes(count: int = 2, side: int = 16) -> np.ndarray:
    images = np.ones((count, 3, side, side), dtype=np.float32)
    images[..., ::2] = -1
    return images


def test_the_blur_is_scipys_gaussian_filter():
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 24)).astype(np.float32)
    expected = gaussian_filter(images, (0, 0, BLUR * 16, BLUR * 24))
    np.testing.assert_allclose(blur(images), expected, atol=1e-5)


def test_the_hottest_quarter_has_a_quarter_of_the_pixels_even_if_many_are_equal():
    heat = np.zeros((2, 8, 8), dtype=np.float32)
    heat[0, :2] = 1
    assert hottest(heat).sum(axis=(1, 2)).tolist() == [16, 16]
    assert hottest(heat)[0, :2].all()


def test_a_true_heatmap_keeps_the_class_alone_and_loses_it_removed():
    images, targets = stripes(), np.array([1, 1])
    heat = np.zeros((2, 16, 16), dtype=np.float32)
    heat[0, :8, :8] = 1  # a quarter of the image, half of what decides
    heat[1, :8, 8:] = 1  # another quarter, which does not matter
    kept, removed = keep_and_remove(LeftHalf(), images, heat, targets)
    whole = LeftHalf().run(images).probabilities[:, 1]
    assert kept[0] > 0.4 > 0.2 > kept[1]
    assert removed[0] < 0.7 * whole[0]
    assert removed[1] == pytest.approx(whole[1], abs=0.05)


@pytest.mark.parametrize(
    ("confidences", "words"),
    [
        ((0.9, 0.8, 0.1), "decides"),
        ((0.9, 0.8, 0.7), "enough for cat, but"),
        ((0.9, 0.1, 0.1), "not enough alone"),
        ((0.9, 0.1, 0.8), "do not trust"),
        ((0.05, 0.9, 0.9), "hardly sees cat"),
    ],
)
def test_the_verdict_says_in_words_what_was_found(confidences, words):
    assert words in verdict("cat", *confidences)
