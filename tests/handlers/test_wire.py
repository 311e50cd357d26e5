from __future__ import annotations

import json
import time

import pytest

from handlers.errors import BadFrames, BadOptions
from handlers.wire import FRAMES_TYPE, MAX_IMAGES, Options, join_frames, parse_options, read_row, split_frames


def test_frames_come_apart_as_they_were_joined():
    images = [b"one", b"", b"three"]
    assert [bytes(image) for image in split_frames(join_frames(images))] == images


@pytest.mark.parametrize(
    "body", [b"", b"\0", b"\0\0\0", b"\0\0\0\2x", b"\xff\xff\xff\xffx", join_frames([b"a"]) + b"\0"]
)
def test_frames_that_do_not_add_up_are_refused(body):
    with pytest.raises(BadFrames):
        split_frames(body)


def test_a_row_of_too_many_images_is_refused():
    with pytest.raises(BadFrames):
        split_frames(join_frames([b""] * (MAX_IMAGES + 1)))


@pytest.mark.parametrize("header", [None, "", "{}", '{"top_k":null}', '{"of_a_later_gateway":1}'])
def test_what_is_not_said_or_not_known_takes_the_defaults(header):
    assert parse_options(header) == Options()


@pytest.mark.parametrize(
    "header",
    [
        "no json",
        "[]",
        "[" * 100_000,
        '{"top_k":0}',
        '{"top_k":true}',
        '{"top_k":"1"}',
        '{"top_k":1.5}',
        '{"deadline":"soon"}',
        '{"alpha":NaN}',
        '{"alpha":1.01}',
        '{"alpha":-1}',
        '{"size":0}',
        '{"size":1025}',
        '{"format":"jpeg"}',
        '{"format":["png"]}',
        '{"target":7}',
        '{"method":""}',
        '{"id":7}',
    ],
)
def test_impossible_options_are_refused(header):
    with pytest.raises(BadOptions):
        parse_options(header)


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


def test_a_deadline_ahead_is_no_error(context):
    header = json.dumps({"deadline": int(time.time() * 1000) + 60_000})
    assert read_row({"body": b"x"}, context({"x-gradserve": header}), 0).error is None
