"""An archive answers in this process: the released model, packed as `gradserve up` packs it."""

import io
from pathlib import Path

import pytest
from PIL import Image

from control.errors import ArchiveError, ControlError
from control.images.archive_source import ArchiveSource
from control.images.sources import Explained, Question
from gradserve import AnswerSet, Failed, Prediction, RegionTest, Unavailable

ROOT = Path(__file__).parents[3]
CAT = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()


def test_images_are_answered_in_order_and_a_bad_one_alone_fails(released_source):
    cat, bad, again = released_source.predict([CAT, b"no image", CAT], top_k=2)
    assert isinstance(cat, Prediction)
    assert (cat.class_name, cat.model.name, len(cat.top)) == ("cat", "cifar10", 2)
    assert isinstance(bad, Failed)
    assert (bad.code, again.class_name) == ("image_unreadable", "cat")


def test_an_explanation_has_evidence_about_the_target_and_an_overlay_of_the_size(released_source):
    found = released_source.explain(CAT, Question(target="dog", size=64))
    assert isinstance(found, Explained)
    assert (found.evidence.class_name, found.evidence.target.class_name) == ("cat", "dog")
    assert Image.open(io.BytesIO(found.overlay)).size == (64, 64)


def test_parts_that_were_asked_for_are_answered_or_say_why_not(released_source):
    evidence = released_source.explain(CAT, Question(coverage=0.9, test=True)).evidence
    assert isinstance(evidence.test, RegionTest)
    assert isinstance(evidence.answer_set, AnswerSet | Unavailable)
    assert evidence.target.confidence == pytest.approx(evidence.confidence)
    assert evidence.heatmap.array().max() == pytest.approx(1)


def test_an_image_that_cannot_be_read_fails_alone(released_source):
    assert released_source.explain(b"no image", Question()).code == "image_unreadable"


@pytest.mark.parametrize(
    ("question", "sentence"),
    [(Question(target="unicorn"), "no class 'unicorn'; this model has airplane"), (Question(method="x"), "method")],
)
def test_an_unknown_class_or_method_is_refused_with_those_that_exist(released_source, question, sentence):
    with pytest.raises(ControlError, match=sentence):
        released_source.explain(CAT, question)


def test_a_damaged_archive_is_refused(released_archive, tmp_path):
    damaged = tmp_path / "cifar10.mar"
    damaged.write_bytes(released_archive.read_bytes()[:1000])
    with pytest.raises(ArchiveError):
        ArchiveSource(damaged)
