import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contracts.model import Input
from training.data.folder import ImageFolder
from training.data.images import (
    Images,
    divide,
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


def write_image(path: Path, size: tuple[int, int] = (100, 70)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def test_folders_of_larger_images_get_a_size_of_their_own(tmp_path):
    for name in ("ants/1.png", "ants/2.png", "bees/1.jpg"):
        write_image(tmp_path / name)
    assert ImageFolder.find(tmp_path, "train").choose_size().height == 64


def test_bad_file_is_named_and_skipped(tmp_path, caplog):
    for name in ("ants/1.png", "bees/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "bees" / "notes.txt").write_text("no image")
    _, labels = ImageFolder.find(tmp_path, "train").read(Input(32, 32, (0.5,) * 3, (0.5,) * 3))
    assert labels.tolist() == [0, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped {tmp_path}/bees/notes.txt: the bytes are no known image"
    ]


def test_folder_of_mostly_bad_files_is_refused(tmp_path):
    write_image(tmp_path / "ants" / "1.png")
    for number in range(3):
        (tmp_path / "bees").mkdir(exist_ok=True)
        (tmp_path / "bees" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="3 of 4 files"):
        ImageFolder.find(tmp_path, "train")


def test_class_without_a_readable_image_is_refused_by_name(tmp_path):
    for name in ("ants/1.png", "ants/2.png", "bees/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "bees" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="there is no image in bees"):
        ImageFolder.find(tmp_path, "train")


def test_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least two folders"):
        ImageFolder.find(tmp_path, "train")


def test_hidden_copies_are_no_images_of_a_class(tmp_path):
    for name in ("ants/1.png", "ants/.ipynb_checkpoints/1-checkpoint.png", "bees/1.png", "bees/.2.png"):
        write_image(tmp_path / name)
    assert len(ImageFolder.find(tmp_path, "train").files) == 2


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus/1.png", "car/1.png", "train/1.png"):
        write_image(tmp_path / name)
    assert ImageFolder.find(tmp_path, "train").classes == ("bus", "car", "train")
    assert ImageFolder.find(tmp_path, "test").classes == ("bus", "car", "train")


def test_parts_without_the_one_that_is_wanted_are_no_classes(tmp_path):
    for name in ("train/ants/1.png", "train/bees/1.png", "val/ants/2.png", "val/bees/2.png"):
        write_image(tmp_path / name)
    with pytest.raises(DataError, match="no folder test"):
        ImageFolder.find(tmp_path, "test")


def test_test_part_is_taken_where_there_is_one(tmp_path):
    for name in ("train/ants/1.png", "train/bees/1.png", "test/ants/7.png", "test/bees/8.png", "test/bees/9.png"):
        write_image(tmp_path / name)
    _, size = load_training_images(f"imagefolder:{tmp_path}", tmp_path)
    assert len(load_test_images(f"imagefolder:{tmp_path}", tmp_path, size)) == 3


@pytest.mark.parametrize("parts", [("ants", "bees", "test"), ("Train", "Test"), ("training", "validation")])
def test_parts_under_other_names_are_no_classes(tmp_path, parts):
    for part in parts:
        inner = ("ants", "bees") if part.lower().startswith(("t", "v")) else (".",)
        for name in inner:
            write_image(tmp_path / part / name / "1.png")
    with pytest.raises(DataError, match=f"{max(parts)} with folders in it"):
        ImageFolder.find(tmp_path, "train")


def test_a_class_called_train_may_have_hidden_folders(tmp_path):
    for name in ("bus/1.png", "train/1.png", "train/.ipynb_checkpoints/1.png"):
        write_image(tmp_path / name)
    assert ImageFolder.find(tmp_path, "train").classes == ("bus", "train")


def test_a_file_that_cannot_be_read_is_named_and_skipped(tmp_path, caplog, monkeypatch):
    for name in ("ants/1.png", "ants/2.png", "bees/1.png"):
        write_image(tmp_path / name)
    read = Path.read_bytes

    def refuse(path):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert len(ImageFolder.find(tmp_path, "train").files) == 2
    assert f"skipped {tmp_path}/ants/2.png: Permission denied" in caplog.text


@pytest.mark.parametrize(("subset", "validation", "missing"), [(0, 0.2, "hold out"), (0, 0.9, "learn from")])
def test_a_class_that_would_be_on_one_side_only_is_refused_by_name(subset, validation, missing):
    labels = np.repeat([0, 1, 2], [500, 498, 2])
    images = Images(np.zeros((1000, 8, 8, 3), np.uint8), labels, ("ants", "bees", "wasps"))
    with pytest.raises(DataError, match=f"no image of wasps to {missing}"):
        divide(images, subset=subset, validation=validation, seed=0)


def test_a_subset_of_nearly_all_says_how_many_can_be_taken(cifar10_labels):
    with pytest.raises(DataError, match="take 49990, or all"):
        stratified_subset(cifar10_labels, 49_995, seed=0)
