import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import session
from training.data.sources import CIFAR10, Published, Split, content_sha256, load_cifar10
from training.errors import CorruptData
from training.recipe import Recipe

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    """A data set of CIFAR-10's form: 1,200 images to train on, and 70."""
    rng = np.random.default_rng(0)
    return {
        name: Split(rng.integers(0, 32, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count).astype(np.uint8))
        for name, count in (("train", 1200), ("test", 70))
    }


@pytest.fixture(scope="module")
def published(splits) -> Published:
    content = {name: content_sha256(split.images, split.labels) for name, split in splits.items()}
    return replace(CIFAR10, content=content)


@pytest.fixture
def parts(splits, tmp_path) -> list[Path]:
    return session.pack(splits, tmp_path / "parts", round(1.2 * session.MIB))


def test_images_travel_in_parts_that_are_small_enough(parts):
    assert len(parts) > 1
    for part in parts:
        assert sum(file.stat().st_size for file in part.iterdir()) <= 1.2 * session.MIB


def test_images_come_out_as_they_went_in_once_all_parts_are_there(parts, splits, published, tmp_path):
    cache = tmp_path / "other machine"
    for number, part in enumerate(parts[:-1], 1):
        assert session.unpack([part], cache, published).startswith(f"{number} of {len(parts)} parts are there: unpack")
    assert session.unpack(parts[-1:], cache, published) == "1200 train images, 70 test images: as published"
    for name, split in load_cifar10(cache, None, published).items():
        assert np.array_equal(split.images, splits[name].images)
        assert np.array_equal(split.labels, splits[name].labels)


def test_damaged_file_is_refused_with_a_remedy(parts, published, tmp_path):
    (parts[0] / "train-000.webp").write_bytes(b"cut off")
    with pytest.raises(SystemExit, match=r"train-000.webp was damaged.*transfer the part again"):
        session.unpack(parts, tmp_path / "cache", published)


def test_other_images_than_the_published_ones_are_refused(parts, tmp_path):
    with pytest.raises(CorruptData):
        session.unpack(parts, tmp_path / "cache")


def test_result_comes_back_in_pieces_without_the_checkpoint(tmp_path):
    run, output = tmp_path / "run", tmp_path / "pieces"
    run.mkdir()
    contents = {"best.pth": b"weights" * 1000, "last.pt": b"x", "contract.json": b"{}"}
    contents["history.json"] = json.dumps([{"validation_accuracy": 0.5}, {"validation_accuracy": 0.75}]).encode()
    for name, content in contents.items():
        (run / name).write_bytes(content)
    written = session.pieces(run, output, 5000)
    assert len(written) > 1
    assert max(path.stat().st_size for path in written) <= 5000
    home = tmp_path / "home" / "run"
    assert session.join(output, home) == f"{home}: 2 epochs, best held-out accuracy 75.00%"
    del contents["last.pt"]
    assert {path.name: path.read_bytes() for path in home.iterdir()} == contents
    written[0].unlink()
    with pytest.raises(SystemExit, match="missing or damaged"):
        session.join(output, home)


def test_estimate_adds_the_epochs_of_each_size_and_kind():
    recipe = Recipe(epochs=10, batch_size=512, sizes=((0.0, 24), (0.5, 32)), sam_radius=0.1, sam_from=0.8)
    speeds = {"plain": {"512": {"24": 45_000, "32": 22_500, "32, sharpness-aware": 9000}}}
    wanted = session.SLOWER * (5 * 1 + 3 * 2 + 2 * 5) + 10 * session.VALIDATION_S
    assert session.estimate(recipe, speeds) == {"plain": pytest.approx(wanted)}


@pytest.mark.long
def test_training_that_was_stopped_is_continued_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(f'data = "imagefolder:{SAMPLES}"\nepochs = 2\nbatch_size = 16\nworkers = 0\nsizes = [[0.0, 8]]\n')
    assert session.train(run, recipe, tmp_path, 0.1, [])
    assert not session.train(run, recipe, tmp_path, 600, ["--seed", "3"])
    digest = hashlib.sha256((run / "best.pth").read_bytes()).hexdigest()
    assert not session.train(run, recipe, tmp_path, 600, ["--seed", "3"])
    assert hashlib.sha256((run / "best.pth").read_bytes()).hexdigest() == digest
    assert len(json.loads((run / "history.json").read_text())) == 2
