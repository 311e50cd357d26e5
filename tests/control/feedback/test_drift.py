"""Drift is found where it was planted, and seldom where it was not."""

import numpy as np
import pytest

from control.feedback.drift import Answers, compare

CLASSES = ("cat", "dog", "frog", "ship")


def answers(seed, count, *, mix=(0.25, 0.25, 0.25, 0.25), sharpness=20.0, unfamiliar=0.05):
    chance = np.random.default_rng(seed)
    return Answers(
        tuple(chance.choice(CLASSES, count, p=mix)),
        tuple(chance.beta(sharpness, 1.0, count)),
        tuple(bool(value) for value in chance.random(count) >= unfamiliar),
    )


REFERENCE = answers(0, 2000)


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"sharpness": 8.0}, "confidence"),
        ({"mix": (0.55, 0.15, 0.15, 0.15)}, "classes"),
        ({"unfamiliar": 0.2}, "familiar"),
    ],
)
def test_planted_drift_is_found_by_its_own_test_alone(changes, about):
    verdict = compare(REFERENCE, answers(1, 600, **changes))
    assert verdict.decision == "drift"
    assert [found.about for found in verdict.comparisons if found.is_drift] == [about]


def test_false_alarms_are_no_more_than_promised():
    alarms = sum(compare(REFERENCE, answers(seed, 400), alpha=0.05).decision == "drift" for seed in range(1, 101))
    assert alarms <= 10  # 5 expected at most; more than 10 has a chance of 1 %


def test_a_difference_that_is_significant_but_small_is_no_drift():
    verdict = compare(answers(0, 40_000), answers(1, 40_000, sharpness=18.0))
    confidence = verdict.comparisons[0]
    assert confidence.p < 1e-6
    assert (confidence.is_drift, verdict.decision) == (False, "none")


def test_few_images_give_no_verdict():
    assert compare(REFERENCE, answers(1, 99)).decision == "too_few"
    assert compare(answers(0, 99), answers(1, 500)).decision == "too_few"


def test_answers_without_familiarity_are_compared_by_the_other_tests():
    recent = Answers(REFERENCE.classes, REFERENCE.confidences, ())
    verdict = compare(REFERENCE, recent)
    assert [found.about for found in verdict.comparisons] == ["confidence", "classes"]
    assert verdict.decision == "none"


def test_one_class_alone_and_rare_classes_break_no_test():
    one = Answers(("cat",) * 200, (0.9,) * 200, ())
    assert compare(one, one).decision == "none"
    rare = Answers((*one.classes[:-1], "dog"), one.confidences, ())
    assert compare(one, rare).decision == "none"


def test_the_verdict_names_what_changed():
    verdict = compare(REFERENCE, answers(1, 600, mix=(0.55, 0.15, 0.15, 0.15)))
    assert "cat is 5" in verdict.comparisons[1].sentence
    assert verdict.false_alarm_rate == 0.01
