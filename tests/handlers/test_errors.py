from __future__ import annotations

import re

import pytest

from handlers import errors
from handlers.errors import (
    AnswerTooLarge,
    BadOptions,
    ImageTooLarge,
    RequestError,
    UnknownExample,
    UnknownMethod,
    UnknownTarget,
)


def test_the_modules_tree_names_every_code():
    told = dict(re.findall(r"── (\w+) +(\w+) ", errors.__doc__))
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RequestError)}
    codes = {kind.__name__: kind.code for kind in kinds - {RequestError, AnswerTooLarge}}
    assert told == codes
    assert len(set(codes.values())) == len(codes)


@pytest.mark.parametrize(
    ("error", "sentence", "facts"),
    [
        (
            ImageTooLarge(9000, 8000, max_pixels=50_000_000, max_side=16_384, max_aspect=2000),
            "9000 x 8000 = 72000000 pixels: send one of at most 50000000 pixels, 16384 a side",
            {"pixels": 72_000_000, "limit": 50_000_000},
        ),
        (UnknownTarget("cow", ("cat", "dog")), "no class 'cow': use one of", {"classes": ["cat", "dog"]}),
        (UnknownMethod("magic", ("cam", "gradcam")), "use cam, gradcam", {"methods": ["cam", "gradcam"]}),
        (UnknownExample(9, 5), "no example 9: use a number below 5", {"examples": 5}),
        (UnknownExample(9, 0), "packed without thumbnails", {"examples": 0}),
        (BadOptions("alpha", "a number from 0 to 1"), "alpha must be a number from 0 to 1", {"option": "alpha"}),
        (AnswerTooLarge(7_000_000, 6_000_000), "top_k must be smaller, or fewer images sent", {"option": "top_k"}),
    ],
)
def test_an_errors_entry_has_its_code_the_remedy_and_the_facts(error, sentence, facts):
    entry = error.entry()["error"]
    assert entry["code"] == error.code
    assert sentence in entry["detail"]
    assert facts.items() <= entry.items()


def test_what_a_caller_sent_is_repeated_only_in_part():
    assert len(UnknownTarget("x" * 10_000, ("cat", "dog")).detail) < 200
    assert len(UnknownTarget("x", tuple(map(str, range(1000)))).facts["classes"]) == 100
