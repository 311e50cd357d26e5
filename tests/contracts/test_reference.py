"""The reference inputs: dumped and parsed again; those that do not match their outputs or the classes are refused."""

import json

import pytest

from contracts import reference
from contracts.reference import BadReference, Reference

IMAGES = (b"one", b"two")
WHOLE = Reference(0.01, IMAGES, ((0.25, 0.75), (1.0, 0.0)), Reference(0.02, IMAGES, ((0.3, 0.7), (0.9, 0.1))))


def data(**changes):
    return json.loads(json.dumps(reference.dump(WHOLE))) | changes


@pytest.mark.parametrize("made", [WHOLE, Reference(0.5, (b"",), ((0.5, 0.5),))])
def test_a_reference_that_is_dumped_is_parsed_again(made):
    assert reference.parse(json.loads(json.dumps(reference.dump(made))), classes=2) == made


def test_a_file_of_the_first_release_is_parsed():
    first = {"tolerance": 0.01, "images": ["b25l"], "probabilities": [[0.25, 0.75]], "made": "by an earlier release"}
    assert reference.parse(first, classes=2) == Reference(0.01, (b"one",), ((0.25, 0.75),))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": []}, "images is [], expected one image or more"),
        ({"images": ["%%%"]}, "images is '%%%', expected images in base64"),
        ({"images": "b25l"}, "images is 'b25l', expected a list"),
        ({"probabilities": [[0.5, 0.5]]}, "expected 2 lists of 2 numbers"),
        ({"probabilities": [[1.0], [1.0]]}, "expected 2 lists of 2 numbers"),
        ({"probabilities": [[0.5, 0.5], [0.5, 2]]}, "probabilities.[1][1] is 2"),
        ({"probabilities": [[0.5, 0.5], [0.5, float("nan")]]}, "probabilities.[1][1] is nan"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"tolerance": 1}, "tolerance is 1"),
        ({"fallback": {"tolerance": 0.1, "probabilities": []}}, "fallback.probabilities is []"),
    ],
)
def test_what_does_not_match_is_refused_with_field_and_remedy(changes, sentence):
    with pytest.raises(BadReference) as refusal:
        reference.parse(data(**changes), classes=2)
    assert sentence in str(refusal.value)
    assert "pack the model again" in str(refusal.value)


@pytest.mark.parametrize("broken", [None, [], 1, "x"])
def test_what_is_no_object_is_refused(broken):
    with pytest.raises(BadReference, match="expected a JSON object"):
        reference.parse(broken, classes=2)
