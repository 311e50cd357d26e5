from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contracts.model import Input
from training.data.folder import ImageFolder, normalised_by
from training.errors import DataError


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


def test_size_is_the_median_shorter_side_in_steps_of_8_within_the_networks_bounds(tmp_path):
    for name, side in (("ants/1.png", 47), ("ants/2.png", 53), ("bees/1.png", 5000)):
        write_image(tmp_path / name, (side, 5000))
    assert ImageFolder.find(tmp_path, "train").choose_size().height == 48
    for name in ("ants/1.png", "ants/2.png"):
        write_image(tmp_path / name, (5, 5))
    assert ImageFolder.find(tmp_path, "train").choose_size().height == 32


def test_images_are_normalised_by_their_own_mean_and_deviation():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    pixels[..., 2] = 51
    size = normalised_by(pixels, Input(8, 8, (0.0,) * 3, (1.0,) * 3))
    np.testing.assert_allclose(size.mean, pixels.reshape(-1, 3).mean(0) / 255, atol=1e-4)
    np.testing.assert_allclose(size.std[:2], pixels.reshape(-1, 3).std(0)[:2] / 255, atol=1e-4)
    assert size.std[2] == 1e-3, "an even channel is not divided by zero"
