from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from contracts.evidence import AnswerSet, Evidence, Familiar
from contracts.model import Contract, Engine
from handlers.engines import Outputs
from handlers.evidence.store import EVIDENCE
from training.data.images import CIFAR10_INPUT, Images
from training.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from training.evaluate.evaluate import measure_corrupted
from training.evaluate.evidence import MeasuredEvidence


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


def test_report_has_each_kind_and_severity_with_their_means(tmp_path):
    class Bright:
        """Answers class 1, surely, where an image's mean is above the middle."""

        def run(self, images):
            right = (images.mean(axis=(1, 2, 3)) > 0).astype(np.float32)
            return Outputs(np.stack([1 - right, right], axis=1), features=images.mean(axis=(2, 3)))

    dark, bright = np.full((2, 16, 32, 32, 3), [[[[[60]]]], [[[[140]]]]], np.uint8)
    images = Images(np.concatenate([dark, bright]), np.arange(32) // 16, ("dark", "bright"))
    contract = Contract("x", "1", images.classes, CIFAR10_INPUT, "resnet18_small", engine=Engine())
    familiar = Familiar("max_probability", neighbours=0, images=4)
    contract = replace(contract, evidence=Evidence(familiar, answer_set=AnswerSet(4)))
    scores = {"familiarity_scores": np.full(4, 0.9, np.float32), "answer_set_scores": np.zeros(4, np.float32)}
    save_file(scores, tmp_path / EVIDENCE)
    report = measure_corrupted(Bright(), images, contract, MeasuredEvidence(tmp_path, contract))
    assert report["images"] == 32
    assert set(report["kinds"]) == set(CORRUPTIONS)
    surely_right = {"accuracy": 1.0, "expected_calibration_error": 0.0, "familiar": 1.0}
    assert report["kinds"]["gaussian_noise"] == surely_right | {"severities": [surely_right] * 5}
    # The highest severity makes the dark ones bright.
    assert report["kinds"]["brightness"]["accuracy"] == pytest.approx(0.9)
    assert [row["accuracy"] for row in report["kinds"]["brightness"]["severities"]] == [1, 1, 1, 1, 0.5]
    strongest = [row["severities"][4]["accuracy"] for row in report["kinds"].values()]
    assert report["severities"][4]["accuracy"] == pytest.approx(np.mean(strongest), abs=1e-4)
    half = report["answer_sets"][0]
    assert (half["asked"], half["mean_size"], half["coverage"]) == (0.8, 1, pytest.approx(report["accuracy"], abs=1e-3))
    assert report["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in report["kinds"].values()]), abs=1e-4)
