from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from contracts.evidence import AnswerSet, Evidence
from handlers.engines import softmax
from handlers.evidence.answer_set import AnswerSets
from handlers.evidence.familiar import Familiarity
from handlers.evidence.similar import Neighbours, thumbnail
from handlers.evidence.store import EVIDENCE, read_store
from training.data.images import Images
from training.package.evidence import FAMILIARITY, MAX_BYTES, _draw_index, balanced_sample, herd, write_evidence

SIDE = 8


def coloured(count: int, classes: int = 3, seed: int = 0, side: int = SIDE) -> Images:
    """Images with a bright stripe whose place is their class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, side, side, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label % side] += 100
    return Images(images, labels, tuple(f"class {label}" for label in range(classes)))


def head_of(classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.eye(classes, SIDE, dtype=np.float32) * 10, np.zeros(classes, np.float32)


def answer_of(classes: int):
    """An engine whose features are the columns' brightness."""
    weight, bias = head_of(classes)

    def answer(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = images.mean(axis=(1, 3))[:, :SIDE].astype(np.float32) / 100
        return softmax(features @ weight.T + bias, 1.0), features

    return answer


def write(folder, training: Images, held_out: Images, **options) -> Evidence:
    classes = len(training.classes)
    return write_evidence(folder, answer_of(classes), head_of(classes), training, held_out, **options)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def evidence(folder) -> Evidence:
    return write(folder, coloured(300), coloured(150, seed=1))


def test_what_is_written_is_what_the_worker_reads(folder, evidence):
    store = read_store(folder)
    held_out = coloured(150, seed=1)
    probabilities, features = answer_of(3)(held_out.images)
    familiarity = Familiarity(store, evidence.familiar)
    found = familiarity.score(probabilities, features)
    assert familiarity.is_familiar(found).mean() == pytest.approx(0.95, abs=0.02)
    assert np.sort(found).tolist() == pytest.approx(np.arange(150) / 150, abs=0.02)
    neighbours = Neighbours(store).nearest(features[:3], np.array([[0], [1], [2]]), k=2)
    assert [neighbour.label for of_image in neighbours for neighbour in of_image] == [0, 0, 1, 1, 2, 2]
    sets = AnswerSets(store).members(probabilities, 0.9)
    covered = [label in members for label, members in zip(held_out.labels, sets, strict=True)]
    assert np.mean(covered) >= 0.9


def test_the_contract_says_what_the_store_holds(folder, evidence):
    assert (evidence.absent, evidence.answer_set) == ((), AnswerSet(150))
    assert evidence.similar.images == len(read_store(folder)["labels"]) <= 300
    assert evidence.similar.accuracy_kept >= 0.95
    report = json.loads((folder / FAMILIARITY).read_text())
    best = report["candidates"][0]
    assert (evidence.familiar.method, evidence.familiar.neighbours) == (best["method"], best["neighbours"])
    assert (folder / EVIDENCE).stat().st_size <= MAX_BYTES


def test_a_thumbnail_shows_its_own_training_image(folder, evidence):
    store = read_store(folder)
    for number, label in enumerate(store["labels"][::40]):
        with Image.open(io.BytesIO(thumbnail(store, number * 40))) as image:
            columns = np.asarray(image).mean(axis=(0, 2))
        assert columns[:3].argmax() == label


def test_no_thumbnails_stores_no_images(tmp_path):
    evidence = write(tmp_path, coloured(60), coloured(30, seed=1), thumbnails=False)
    assert not evidence.similar.thumbnails
    assert not {"thumbnails", "thumbnail_ends"} & set(read_store(tmp_path))


def test_few_images_and_two_classes_have_what_can_be_computed_and_a_reason_for_the_rest(tmp_path):
    evidence = write(tmp_path, coloured(8, classes=2), coloured(4, classes=2, seed=1))
    assert evidence.familiar is None
    assert "4 images were held out, and 20 are needed" in dict(evidence.absent)["familiar"]
    assert (evidence.similar.images, evidence.answer_set) == (8, AnswerSet(4))


def test_a_network_without_pooled_features_has_answer_sets_alone(tmp_path):
    held_out = coloured(30)
    probabilities, _ = answer_of(3)(held_out.images)
    evidence, figures = write_evidence(tmp_path, lambda images: (probabilities, None), None, coloured(60), held_out)
    assert (evidence.familiar, evidence.similar, figures) == (None, None, ())
    assert dict(evidence.absent).keys() == {"familiar", "similar"}


def test_a_thousand_classes_of_large_images_fit_into_the_limit(tmp_path):
    training, held_out = coloured(1000, classes=1000, side=72), coloured(30, classes=1000, seed=1, side=72)
    evidence = write(tmp_path, training, held_out)
    assert (tmp_path / EVIDENCE).stat().st_size <= MAX_BYTES
    assert evidence.similar.images == 1000
    assert set(read_store(tmp_path)["labels"]) == set(range(1000))


def test_thumbnails_get_smaller_before_the_index_loses_a_class():
    images = coloured(40, classes=40, side=72)
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)

    def sides(room: int) -> tuple[int, set[int]]:
        rows, files = _draw_index(vectors, images, room, thumbnails=True)
        return len(rows), {Image.open(io.BytesIO(file)).width for file in files}

    found = [sides(room) for room in (10_000_000, 150_000, 60_000, 1000, 500)]
    assert [count for count, _ in found] == [40, 40, 40, 40, 0]
    widths = [max(of_room, default=0) for _, of_room in found]
    assert widths[0] == 64
    assert widths == sorted(widths, reverse=True)
    assert widths[3:] == [0, 0]


def test_herding_follows_the_mean_and_takes_no_image_twice():
    vectors = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    chosen = herd(vectors, 20)
    assert len(set(chosen.tolist())) == 20
    assert herd(vectors, 7).tolist() == chosen[:7].tolist()
    random = np.linalg.norm(vectors[:20].mean(axis=0) - vectors.mean(axis=0))
    assert np.linalg.norm(vectors[chosen].mean(axis=0) - vectors.mean(axis=0)) < random / 3
    assert sorted(herd(vectors[:3], 9).tolist()) == [0, 1, 2]


def test_a_balanced_sample_has_every_class_however_rare():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    chosen = labels[balanced_sample(labels, 21)]
    assert np.bincount(chosen).tolist() == [11, 9, 1]
