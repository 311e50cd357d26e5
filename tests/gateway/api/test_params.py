"""Query parameters and headers of a call: what is impossible is refused before the body is read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts import wire
from gateway.api import params
from gateway.inference.questions import Overlay, Question
from gateway.refusals import BadParameter

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

IMAGE = b"image-of-dog"


@pytest.mark.parametrize(
    "route",
    [
        "/predict?top_k=0",
        "/predict?top_k=-1",
        "/predict?top_k=x",
        "/predict?top_k=1_0",
        "/predict?top_k=%D9%A1",
        "/predict?top_k=",
        "/predict?top_k=1&top_k=2",
        "/predict?topk=1",
        "/predict?version=..",
        "/predict?version=1/2",
        "/predict?version=",
        "/predict/batch?top_k=0",
        "/predict/batch?version=-",
        "/explain?target=",
        "/explain?method=" + "x" * 201,
        "/explain?alpha=1.1",
        "/explain?alpha=nan",
        "/explain?alpha=x",
        "/explain?size=0",
        "/explain?size=1025",
        "/explain?top_k=1",
        "/explain?coverage=0.49",
        "/explain?coverage=1",
        "/explain?coverage=nan",
        "/explain?test=yes",
        "/explain?similar=11",
        "/explain?similar=-1",
        "/explain?heatmap=png",
        "/explain/batch?alpha=0.5",
        "/explain?version=%00",
        "/v2/models/cifar10/versions/-/infer",
    ],
)
def test_a_bad_parameter_is_400(stand: Stand, route: str, assert_problem: Callable[..., None]) -> None:
    assert_problem(stand.client.post(route, content=IMAGE), 400, "bad_parameter")
    assert not stand.torchserve.calls


@pytest.mark.parametrize("timeout_ms", ["0", "-1", "x", "1.5"])
def test_a_bad_timeout_is_400(stand: Stand, timeout_ms: str, assert_problem: Callable[..., None]) -> None:
    answer = stand.client.post("/predict", content=IMAGE, headers={"x-timeout-ms": timeout_ms})
    assert_problem(answer, 400, "bad_parameter")


@given(st.text(max_size=14) | st.integers(-2000, 2000).map(str))
def test_only_plain_digits_within_the_bounds_are_a_whole_number(text: str) -> None:
    is_number = re.fullmatch(r"[0-9]{1,12}", text) is not None and 1 <= int(text) <= 1000
    if is_number:
        assert params.whole_number("top_k", 1, 1000, text) == int(text)
        return
    with pytest.raises(BadParameter, match="is not a whole number from 1 to 1000"):
        params.whole_number("top_k", 1, 1000, text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1_0", "", " ", "0x1", "\u0661", "1.01", "-0.01", "1e400"])
def test_what_is_no_number_within_the_bounds_is_refused(text: str) -> None:
    with pytest.raises(BadParameter, match="is not a number from 0 to 1"):
        params.check_number("alpha", 0, 1, text)


@pytest.mark.parametrize(
    ("accept", "is_wanted"),
    [
        ("application/json", True),
        ("application/json, text/plain", True),
        ("", False),
        ("*/*", False),
        ("image/png", False),
        ("image/webp, application/json;q=0.9", False),
    ],
)
def test_numbers_come_if_json_and_no_image_is_accepted(accept: str, is_wanted: bool) -> None:
    assert params.wants_json(accept) == is_wanted


def test_an_unknown_parameter_is_refused_with_those_that_the_route_takes(stand: Stand) -> None:
    refused = stand.client.post("/predict?topk=1", content=IMAGE).json()
    assert (refused["parameter"], refused["detail"]) == (
        "topk",
        "The parameter 'topk' is unknown here; known: top_k, version, model.",
    )


def test_an_overlays_question_asks_for_nothing_that_an_overlay_does_not_show() -> None:
    query = params.ExplainQuery.model_validate({"target": "cat", "coverage": "0.9", "test": "true", "size": "64"})
    assert query.question() == Question(target="cat", coverage=0.9, test=True, similar=params.DEFAULT_SIMILAR)
    assert query.overlay_question() == Question(target="cat", overlay=Overlay(wire.DEFAULTS.alpha, 64))
