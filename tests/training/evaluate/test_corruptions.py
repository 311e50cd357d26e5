import numpy as np
import pytest

from contracts.model import Contract, Engine
from training.data.images import CIFAR10_INPUT, Images
from training.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from training.evaluate.evaluate import measure_corrupted


def smooth(count: int = 8) -> np.ndarray:
    """Images (N, 32, 32, 3) of a few soft waves."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    slopes = rng.uniform(0.1, 0.4, (2, count, 1, 1, 3))
    waves = np.sin(slopes[0] * rows[..., None] + slopes[1] * columns[..., None])
    return (128 + 80 * waves).astype(np.uint8)


def changes(kind: str) -> list[float]:
    """Mean absolute difference to the image, by severity."""
    images = smooth()
    return [float(np.abs(corrupt(images, kind, level).astype(float) - images).mean()) for level in SEVERITIES]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_images_are_images_that_differ_and_the_same_ones_again(kind):
    images = smooth()
    corrupted = corrupt(images, kind, 3)
    assert (corrupted.shape, corrupted.dtype) == (images.shape, np.uint8)
    assert not np.array_equal(corrupted, images)
    assert np.array_equal(corrupted, corrupt(images, kind, 3))


@pytest.mark.parametrize(
    "kind",
    ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "fog", "brightness", "contrast"],
)
def test_greater_severity_changes_more(kind):
    assert changes(kind) == sorted(changes(kind))


def test_noise_has_the_published_strength():
    grey = np.full((64, 32, 32, 3), 128, np.uint8)
    assert corrupt(grey, "gaussian_noise", 3).std() / 255 == pytest.approx(0.08, rel=0.02)
    assert corrupt(grey, "shot_noise", 5).std() / 255 == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.02)
    assert np.mean(corrupt(grey, "impulse_noise", 5) != 128) == pytest.approx(0.07, rel=0.05)


def test_contrast_keeps_the_mean_and_brightness_the_hue():
    images = smooth()
    assert corrupt(images, "contrast", 5).mean() == pytest.approx(images.mean(), abs=1)
    red = np.full((1, 32, 32, 3), (100, 50, 0), np.uint8)
    assert corrupt(red, "brightness", 2)[0, 0, 0].tolist() == [125, 62, 0]  # value 100 + 25.5, in the same ratio


def test_blurs_keep_an_even_image_as_it_is():
    grey = np.full((2, 32, 32, 3), 100, np.uint8)
    for kind in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"):
        assert np.abs(corrupt(grey, kind, 5).astype(int) - 100).max() <= 1, kind


def test_report_has_each_kinds_mean_over_severities_and_the_mean_over_kinds():
    class Bright:
        """Answers class 1, surely, where an image's mean is above the middle."""

        def predict(self, images):
            right = (images.mean(axis=(1, 2, 3)) > 0).astype(np.float32)
            return np.stack([1 - right, right], axis=1)

    dark, bright = np.full((2, 16, 32, 32, 3), [[[[[60]]]], [[[[140]]]]], np.uint8)
    images = Images(np.concatenate([dark, bright]), np.arange(32) // 16, ("dark", "bright"))
    contract = Contract("x", "1", images.classes, CIFAR10_INPUT, "resnet18_small", engine=Engine())
    report = measure_corrupted(Bright(), images, contract)
    assert report["images"] == 32
    assert set(report["kinds"]) == set(CORRUPTIONS)
    assert report["kinds"]["gaussian_noise"] == {"accuracy": 1.0, "expected_calibration_error": 0.0}
    # The highest severity makes the dark ones bright.
    assert report["kinds"]["brightness"]["accuracy"] == pytest.approx(0.9)
    assert report["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in report["kinds"].values()]), abs=1e-4)
