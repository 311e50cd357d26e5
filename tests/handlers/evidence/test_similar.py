from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from handlers.evidence.similar import Neighbours, thumbnail

HALF = np.sqrt(0.5)


@pytest.fixture
def store():
    # Two images of class 0, one of class 1, none of class 2, two of class 3.
    features = np.array([[1, 0], [HALF, HALF], [0, 1], [-1, 0], [0, -1]], np.float32)
    return {"features": features, "labels": np.array([0, 0, 1, 3, 3], np.int32)}


def test_the_nearest_of_both_classes_come_by_falling_similarity(store):
    (found,) = Neighbours(store).nearest(np.array([[5, 0]], np.float32), np.array([[1, 0]]), k=2)
    assert [(neighbour.id, neighbour.label) for neighbour in found] == [(0, 0), (1, 0), (2, 1)]
    assert [neighbour.similarity for neighbour in found] == pytest.approx([1, HALF, 0])


def test_each_image_is_compared_with_its_own_classes(store):
    images = np.array([[1, 0], [0, -2]], np.float32)
    found = Neighbours(store).nearest(images, np.array([[0, 1], [3, 0]]), k=1)
    assert [[neighbour.id for neighbour in of_image] for of_image in found] == [[0, 2], [4, 0]]
    assert found[1][0].similarity == pytest.approx(1)


def test_no_more_are_given_than_asked_or_than_a_class_has(store):
    neighbours, image = Neighbours(store), np.array([[1, 0]], np.float32)
    assert neighbours.nearest(image, np.array([[0, 1]]), k=0) == [[]]
    assert [neighbour.label for neighbour in neighbours.nearest(image, np.array([[2, 1]]), k=5)[0]] == [1]


def test_a_thumbnail_is_a_png_of_its_own_image():
    files = [encoded((200, 0, 0)), encoded((0, 0, 200))]
    store = {
        "thumbnails": np.frombuffer(b"".join(files), np.uint8),
        "thumbnail_ends": np.cumsum([len(file) for file in files]),
    }
    colours = []
    for number in (0, 1):
        with Image.open(io.BytesIO(thumbnail(store, number) or b"")) as image:
            assert image.format == "PNG"
            colours.append(int(np.argmax(image.convert("RGB").getpixel((4, 4)))))
    assert colours == [0, 2]
    assert thumbnail(store, 2) is None
    assert thumbnail(store, -1) is None


def test_an_archive_without_thumbnails_has_none():
    assert thumbnail({}, 0) is None


def encoded(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "WEBP", quality=80)
    return file.getvalue()
