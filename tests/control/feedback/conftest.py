import io

import pytest
from PIL import Image

from gateway.feedback.store import Feedback, FeedbackStore, LoggedCall


def image(colour, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, form)
    return file.getvalue()


@pytest.fixture
def empty_store(tmp_path):
    """A store without calls."""
    store = FeedbackStore(tmp_path / "feedback.db")
    store.create()
    return store


@pytest.fixture
def store(empty_store):
    """A store with four calls: two corrected, one confirmed, one without feedback; one without its image."""
    store = empty_store
    rows = [
        ("r1", "cat", image("red"), "dog"),
        ("r2", "cat", image("blue", "JPEG"), "cat"),
        ("..r3", "cat", None, "dog"),
        ("r4", "dog", image("green"), None),
    ]
    for number, (request_id, name, data, right) in enumerate(rows):
        store.add([LoggedCall(request_id, 100.0 + number, "pets", "1.0.0", name, 0.9, True, {}, data)])
        if right:
            store.put(Feedback(request_id, 200.0 + number, right, "sure", "alice"))
    return store
