"""A row of TorchServe's batch: which header decides its kind, and what is wrong with it stays with it."""

from __future__ import annotations

import json
import time

import pytest

from contracts.wire import FRAMES_TYPE, join_frames
from handlers.wire import read_row


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({"explain": "False"}, "predict"),
        ({"explain": "True"}, "explain"),
        ({"explain": "False", "Explain": "True"}, "predict"),
        ({"describe": "True"}, "describe"),
        ({}, "predict"),
    ],
)
def test_only_torchserves_own_spelling_decides_the_kind(headers, kind, context):
    assert read_row({"body": b"x"}, context(headers), 0).kind == kind


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": FRAMES_TYPE},
        {"body": {"content-type": FRAMES_TYPE}, "Content-Type": FRAMES_TYPE},
        {"body": {"content-type": f"{FRAMES_TYPE}; charset=binary"}},
    ],
)
def test_frames_are_recognised_however_the_client_wrote_the_header(headers, context):
    row = read_row({"body": bytearray(join_frames([b"a", b"b"]))}, context(headers), 0)
    assert [bytes(image) for image in row.images] == [b"a", b"b"]


def test_each_row_is_read_by_its_own_headers(context):
    both = context({"x-gradserve": '{"top_k":3}'}, {"explain": "True", "x-gradserve": '{"target":"cat"}'})
    rows = [read_row({"body": b"x"}, both, index) for index in range(2)]
    assert [(row.kind, row.options.top_k, row.options.target) for row in rows] == [
        ("predict", 3, None),
        ("explain", 1, "cat"),
    ]


@pytest.mark.parametrize(
    ("part", "headers", "code"),
    [
        ({"body": {"parsed": "json"}}, {}, "bad_frames"),
        ({"body": join_frames([b"a", b"b"])}, {"explain": "True", "content-type": FRAMES_TYPE}, "bad_frames"),
        ({"body": b"x"}, {"x-gradserve": "{"}, "bad_options"),
        ({"body": b"x"}, {"x-gradserve": '{"deadline":1}'}, "deadline_passed"),
    ],
)
def test_what_is_wrong_with_a_row_is_in_its_error(part, headers, code, context):
    error = read_row(part, context(headers), 0).error
    assert error is not None
    assert error.code == code


def test_a_row_with_bad_options_gets_an_error_for_each_of_its_images(context):
    part = {"body": join_frames([b"a", b"b"])}
    row = read_row(part, context({"content-type": FRAMES_TYPE, "x-gradserve": "{"}), 0)
    assert row.error is not None
    assert len(row.images) == 2


def test_a_deadline_ahead_is_no_error(context):
    header = json.dumps({"deadline": int(time.time() * 1000) + 60_000})
    assert read_row({"body": b"x"}, context({"x-gradserve": header}), 0).error is None
