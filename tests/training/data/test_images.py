import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.images import (
    Images,
    divide,
    encode_png,
    load_test_images,
    load_training_images,
    stratified_split,
    stratified_subset,
)
from training.errors import DataError

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def cifar10_labels():
    """The labels of CIFAR-10's 50,000 training images, in their published order."""
    packed = Path(__file__).with_name("cifar10-train-labels.gz").read_bytes()
    return np.frombuffer(gzip.decompress(packed), np.uint8).astype(np.int64)


def test_split_of_the_real_labels_has_4000_and_1000_of_each_class(cifar10_labels):
    training, validation = stratified_split(cifar10_labels, 0.2, seed=0)
    assert np.bincount(cifar10_labels[training]).tolist() == [4000] * 10
    assert np.bincount(cifar10_labels[validation]).tolist() == [1000] * 10


def test_split_loses_no_image_and_shares_none(cifar10_labels):
    both = np.concatenate(stratified_split(cifar10_labels, 0.2, seed=0))
    np.testing.assert_array_equal(np.sort(both), np.arange(50_000))


def test_split_is_the_seeds(cifar10_labels):
    first, again, other = (stratified_split(cifar10_labels, 0.2, seed=seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_subset_keeps_the_classes_shares(cifar10_labels):
    subset = stratified_subset(cifar10_labels, 2000, seed=0)
    assert np.bincount(cifar10_labels[subset]).tolist() == [200] * 10


@pytest.mark.parametrize("size", [1700, 3400, 7000])
def test_subset_has_just_as_many_images(cifar10_labels, size):
    assert len(stratified_subset(cifar10_labels, size, seed=0)) == size


def test_split_that_leaves_a_class_out_is_refused():
    with pytest.raises(DataError, match="cannot be split"):
        stratified_split(np.array([0, 0, 0, 1]), 0.2, seed=0)


def test_unknown_data_names_what_there_is(tmp_path):
    with pytest.raises(DataError, match="imagefolder:PATH"):
        load_training_images("mnist", tmp_path)


def test_folder_gives_classes_size_mean_and_std(tmp_path):
    images, size = load_training_images(f"imagefolder:{SAMPLES}", tmp_path)
    assert images.classes[:3] == ("airplane", "automobile", "bird")
    assert images.images.shape == (100, 32, 32, 3)
    assert np.bincount(images.labels).tolist() == [10] * 10
    assert (size.height, size.width) == (32, 32)
    np.testing.assert_allclose(size.mean, images.images.reshape(-1, 3).mean(axis=0) / 255, atol=1e-4)
    np.testing.assert_allclose(size.std, images.images.reshape(-1, 3).std(axis=0) / 255, atol=1e-4)


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path)


def test_test_part_is_taken_where_there_is_one(tmp_path):
    for name in ("train/ants/1.png", "train/bees/1.png", "test/ants/7.png", "test/bees/8.png", "test/bees/9.png"):
        write_image(tmp_path / name)
    _, size = load_training_images(f"imagefolder:{tmp_path}", tmp_path)
    assert len(load_test_images(f"imagefolder:{tmp_path}", tmp_path, size)) == 3


@pytest.mark.parametrize(("subset", "validation", "missing"), [(0, 0.2, "hold out"), (0, 0.9, "learn from")])
def test_a_class_that_would_be_on_one_side_only_is_refused_by_name(subset, validation, missing):
    labels = np.repeat([0, 1, 2], [500, 498, 2])
    images = Images(np.zeros((1000, 8, 8, 3), np.uint8), labels, ("ants", "bees", "wasps"))
    with pytest.raises(DataError, match=f"no image of wasps to {missing}"):
        divide(images, subset=subset, validation=validation, seed=0)


def test_a_subset_of_nearly_all_says_how_many_can_be_taken(cifar10_labels):
    with pytest.raises(DataError, match="take 49990, or all"):
        stratified_subset(cifar10_labels, 49_995, seed=0)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_png_holds_the_same_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels)), formats=("PNG",)) as image:
        assert np.array_equal(np.asarray(image), pixels)
