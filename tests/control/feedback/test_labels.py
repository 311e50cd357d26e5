"""Labels that are likely wrong, by the released model's answers to this repository's samples."""

from pathlib import Path

import pytest

from control.archive import inspect_archive
from control.errors import ControlError, FeedbackUnusable
from control.feedback.labels import find_wrong_labels, in_feedback, in_folder
from gateway.feedback.store import Feedback
from gradserve import Failed
from gradserve.answers import parse_prediction

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def mislabelled(tmp_path):
    """A folder of the samples in which four images lie in the folder of another class."""
    for path in sorted(SAMPLES.rglob("*.png")):
        target = tmp_path / "photos" / path.parent.name / f"{path.parent.name}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    moved = []
    for name, other in (("cat", "ship"), ("frog", "truck"), ("horse", "bird"), ("ship", "dog")):
        path = tmp_path / "photos" / other / f"{name}-0.png"
        (tmp_path / "photos" / name / path.name).rename(path)
        moved.append(path)
    return tmp_path / "photos", moved


def test_planted_wrong_labels_are_found(released_archive, released_source, mislabelled):
    folder, moved = mislabelled
    classes = inspect_archive(released_archive).contract.classes
    found = find_wrong_labels(in_folder(folder), classes, released_source, lambda: None)
    assert found.images == 100
    assert {str(path) for path in moved} <= {suspect.name for suspect in found.suspects}
    assert len(found.suspects) <= 8
    by_name = {suspect.name: suspect for suspect in found.suspects}
    assert (by_name[str(moved[0])].label, by_name[str(moved[0])].likely) == ("ship", "cat")


class ByContent:
    """Is sure that an image is of the class which its content names."""

    def predict(self, images, top_k):
        return [self.answer(image.decode()) for image in images]

    def answer(self, name):
        if name == "bad":
            return Failed(status=422, code="image_unreadable", detail="", document={})
        other = "dog" if name == "cat" else "cat"
        top = [{"class": name, "confidence": 0.95}, {"class": other, "confidence": 0.05}]
        return parse_prediction({**top[0], "top": top})


def test_a_file_that_is_no_image_is_named_and_the_rest_is_judged(tmp_path):
    for number in range(20):
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{number}.png").write_text(label)
    (tmp_path / "cat" / "0.png").write_text("bad")
    (tmp_path / "cat" / "1.png").write_text("dog")
    counted = []
    found = find_wrong_labels(in_folder(tmp_path), ("cat", "dog"), ByContent(), lambda: counted.append(1))
    assert (found.images, len(counted)) == (39, 40)
    assert found.unreadable == (str(tmp_path / "cat" / "0.png"),)
    (suspect,) = found.suspects
    assert (suspect.name, suspect.label, suspect.likely) == (str(tmp_path / "cat" / "1.png"), "cat", "dog")
    assert suspect.quality == pytest.approx(0.05)


def test_images_that_cannot_be_read_at_all_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_text("bad")
    with pytest.raises(ControlError, match="no image with a label that the model can read"):
        find_wrong_labels(in_folder(tmp_path), ("cat", "dog"), ByContent(), lambda: None)


def test_a_folder_without_a_folder_for_each_class_is_refused(tmp_path):
    (tmp_path / "1.png").write_text("cat")
    with pytest.raises(ControlError, match="one folder of images for each class"):
        in_folder(tmp_path)


def test_feedback_labels_the_images_that_were_kept(store):
    found = in_feedback(store.path)
    assert [(image.name, image.label, image.content()[:4]) for image in found] == [
        ("r1", "dog", b"\x89PNG"), ("r2", "cat", b"\xff\xd8\xff\xe0")
    ]  # fmt: skip


def test_a_store_without_a_labelled_image_is_refused(empty_store):
    empty_store.put(Feedback("r1", 1.0, "cat", "", ""))
    with pytest.raises(FeedbackUnusable, match="no image with feedback"):
        in_feedback(empty_store.path)


def test_a_label_that_is_no_class_of_the_model_is_refused(tmp_path):
    (tmp_path / "unicorn").mkdir()
    (tmp_path / "unicorn" / "1.png").write_bytes(b"x")
    with pytest.raises(ControlError, match="no class unicorn"):
        find_wrong_labels(in_folder(tmp_path), ("cat", "dog"), ByContent(), lambda: None)
