"""Logged calls are compared with what a candidate answers to their images."""

import json

import pytest

from control.errors import FeedbackUnusable
from control.feedback.replay import replay
from gateway.feedback.store import Feedback, LoggedCall
from gradserve import Failed
from gradserve.answers import parse_prediction


class Candidate:
    """Answers each image, whose content is `class confidence`, with that."""

    def predict(self, images, top_k):
        return [self.answer(*image.decode().split()) for image in images]

    def answer(self, name, confidence):
        if name == "bad":
            return Failed(status=422, code="image_unreadable", detail="", document={})
        best = {"class": name, "confidence": float(confidence)}
        return parse_prediction({**best, "top": [best]})


def log(store, *rows):
    """Log calls of (class that was answered, the candidate's answer, the right class by feedback)."""
    for number, (was, image, right) in enumerate(rows):
        content = image and image.encode()
        store.add([LoggedCall(f"r{number}", 100.0 + number, "pets", "1.0.0", was, 0.8, None, {}, content)])
        if right:
            store.put(Feedback(f"r{number}", 300.0, right, "", ""))


def run(store, **options):
    counted = []
    found = replay(store, Candidate(), limit=options.pop("limit", 100), count=lambda: counted.append(1), **options)
    return found, len(counted)


def test_differences_are_listed_surest_first_and_counted_by_their_classes(empty_store):
    log(
        empty_store,
        ("cat", "cat 0.9", None),
        ("cat", "dog 0.6", None),
        ("cat", "dog 0.7", None),
        ("dog", "cat 0.9", None),
    )
    found, counted = run(empty_store)
    assert (found.images, found.agree, counted) == (4, 1, 4)
    assert [(row.request_id, row.was, row.now) for row in found.differences] == [
        ("r3", "dog", "cat"), ("r2", "cat", "dog"), ("r1", "cat", "dog")
    ]  # fmt: skip
    assert found.changes() == [("cat", "dog", 2), ("dog", "cat", 1)]
    assert found.confidence_shift == pytest.approx((0.1 - 0.2 - 0.1 + 0.1) / 4)
    assert found.agreement[0] < 0.25 < found.agreement[1]
    assert json.loads(json.dumps(found.dump()))["agree"] == 1


def test_feedback_says_if_the_candidate_is_better(empty_store):
    better = [("cat", "dog 0.9", "dog")] * 6
    log(empty_store, *better, ("cat", "dog 0.9", "cat"), ("cat", "cat 0.9", "cat"), ("cat", "fox 0.9", "owl"))
    found, _ = run(empty_store)
    assert (found.labelled, found.right_before, found.right_now) == (9, 2, 7)
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)  # exact McNemar: 6 of 7 changes for the better


def test_without_feedback_there_is_no_p_value_and_with_equal_answers_it_is_1(empty_store):
    log(empty_store, ("cat", "cat 0.9", None))
    assert run(empty_store)[0].p is None
    empty_store.put(Feedback("r0", 1.0, "cat", "", ""))
    assert run(empty_store)[0].p == 1.0


def test_images_that_the_candidate_refuses_are_counted_apart(empty_store):
    log(empty_store, ("cat", "bad 0", None), ("cat", "cat 0.9", None), ("cat", None, None))
    found, counted = run(empty_store)
    assert (found.images, found.failed, counted) == (1, 1, 2), "a call without its image is not replayed"


def test_the_newest_calls_are_replayed(empty_store):
    log(empty_store, *[("cat", f"cat 0.{number}", None) for number in range(5)])
    assert run(empty_store, limit=2)[0].confidence_shift == pytest.approx(0.35 - 0.8)
    assert run(empty_store, since=104.0)[0].images == 1


def test_a_store_without_images_names_the_setting(empty_store):
    with pytest.raises(FeedbackUnusable, match="GATEWAY_FEEDBACK_SAMPLE"):
        run(empty_store)
