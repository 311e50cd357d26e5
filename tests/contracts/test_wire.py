"""The private wire: what either side dumps, the other parses; what breaks it is refused with its own error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts import model, wire
from contracts.wire import BadAnswer, BadFrames, BadOptions, Options


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8))
def test_the_images_that_are_dumped_are_parsed_again(images):
    request = wire.dump_request(images, Options())
    assert [bytes(image) for image in wire.parse_body(request.content_type, request.body)] == images


def test_frames_are_big_endian_lengths_and_bytes():
    assert wire.join_frames([b"ab", b"", b"c"]) == b"\0\0\0\2ab\0\0\0\0\0\0\0\1c"


def test_one_image_travels_as_it_is():
    assert wire.dump_request([b"image"], Options())[::2] == ("application/octet-stream", b"image")


@pytest.mark.parametrize("content_type", [wire.FRAMES_TYPE.upper(), f" {wire.FRAMES_TYPE} ; charset=binary"])
def test_frames_are_recognised_in_any_case_and_with_parameters(content_type):
    assert len(wire.parse_body(content_type, wire.join_frames([b"a", b"b"]))) == 2


@pytest.mark.parametrize(
    "body", [b"", b"\0", b"\0\0\0", b"\0\0\0\2x", b"\xff\xff\xff\xffx", wire.join_frames([b"a"]) + b"\0"]
)
def test_frames_that_do_not_add_up_are_refused(body):
    with pytest.raises(BadFrames):
        wire.split_frames(body)


def test_a_request_of_too_many_images_is_refused():
    with pytest.raises(BadFrames, match="more than 1024"):
        wire.split_frames(wire.join_frames([b""] * (wire.MAX_IMAGES + 1)))


@given(st.binary(max_size=200))
def test_no_body_makes_the_reader_of_frames_fail_otherwise(body):
    try:
        images = wire.split_frames(body)
    except BadFrames:
        return
    assert wire.join_frames(images) == body


IMAGE_OPTIONS = st.builds(
    wire.ImageOptions,
    explain=st.booleans(),
    target=st.none() | st.integers(0, 100_000),
    method=st.none() | st.text(min_size=1, max_size=60),
    coverage=st.none() | st.floats(0.5, 0.999),
    test=st.booleans(),
    similar=st.integers(0, wire.MAX_SIMILAR),
)

OPTIONS = st.builds(
    Options,
    id=st.text(max_size=200),
    deadline=st.none() | st.integers(0, 2**53),
    traceparent=st.none() | st.text(min_size=1, max_size=60),
    top_k=st.integers(1, 1000),
    target=st.none() | st.text(min_size=1, max_size=60),
    method=st.none() | st.text(min_size=1, max_size=60),
    alpha=st.floats(0, 1),
    size=st.none() | st.integers(1, wire.MAX_OVERLAY_SIDE),
    format=st.sampled_from(["png", "json"]),
    images=st.lists(IMAGE_OPTIONS, max_size=8).map(tuple),
    example=st.none() | st.integers(0, 2**31),
)


@given(OPTIONS)
def test_the_options_that_are_dumped_are_parsed_again_and_fit_into_a_header(options):
    header = wire.dump_options(options)
    assert wire.parse_options(header) == options
    assert header.isascii()
    assert "\n" not in header


def test_options_with_their_default_are_not_sent():
    assert wire.dump_options(Options("r", top_k=1)) == '{"id":"r"}'
    explained = Options(images=(wire.PREDICT, wire.ImageOptions(explain=True, target=3)))
    assert wire.dump_options(explained) == '{"images":[{},{"explain":true,"target":3}]}'


def test_plain_options_of_32_explanations_fit_into_the_header():
    image = wire.ImageOptions(True, 99_999, "contrastcam", 0.95, test=True, similar=10)
    assert len(wire.dump_options(Options("r" * 36, 2**53, "t" * 55, 1000, images=(image,) * 32))) < (
        wire.MAX_OPTIONS_BYTES
    )


@pytest.mark.parametrize("header", [None, "", "{}", '{"top_k":null}', '{"of_a_later_gateway":1}'])
def test_options_that_are_missing_or_not_known_take_the_defaults(header):
    assert wire.parse_options(header) == Options()


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
        '{"images":{}}',
        '{"images":[1]}',
        '{"images":[{"explain":1}]}',
        '{"images":[{"target":"cat"}]}',
        '{"images":[{"target":-1}]}',
        '{"images":[{"method":""}]}',
        '{"images":[{"coverage":0.4}]}',
        '{"images":[{"coverage":true}]}',
        '{"images":[{"test":"yes"}]}',
        '{"images":[{"similar":11}]}',
        '{"example":-1}',
    ],
)
def test_impossible_options_are_refused(header):
    with pytest.raises(BadOptions):
        wire.parse_options(header)


def test_every_kind_of_entry_that_is_dumped_is_parsed_again():
    entries = [
        wire.dump_prediction([("cat", 0.9), ("dog", 0.1)]),
        {"class": "cat", "confidence": 0.9, "target": "dog", "layer": "layer4", "heatmap": [[0.0, 1.0]]},  # of wire 1
        wire.dump_error("image_too_large", "send a smaller one", {"limit": 7}),
        wire.dump_prediction([("cat", 0.9)], familiar=False),
        wire.dump_evidence(
            ("cat", 0.9),
            target=("dog", 0.1),
            method="cam",
            strength=1.5,
            heatmap=wire.dump_heatmap(1, 2, b"\0\xff"),
            familiar=True,
            similar=wire.unavailable("none"),
        ),
    ]
    assert wire.parse_results(wire.dump_results(entries), 5) == entries
    assert entries[0]["class"] == "cat"
    assert "familiar" not in entries[0]
    assert entries[3]["familiar"] is False
    assert entries[4]["target"] == {"class": "dog", "confidence": 0.1}
    assert entries[4]["similar"] == {"unavailable": "none"}
    assert wire.parse_error(entries[2]) == ("image_too_large", "send a smaller one", {"limit": 7})


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_the_heatmap_that_is_dumped_is_parsed_again(height, width, data):
    values = data.draw(st.binary(min_size=height * width, max_size=height * width))
    rows = wire.parse_heatmap(wire.dump_heatmap(height, width, values))
    assert [len(row) for row in rows] == [width] * height
    assert b"".join(rows) == values


@pytest.mark.parametrize(
    "heatmap",
    [
        None,
        [],
        {},
        {"height": 1, "width": 1, "values": "?"},
        {"height": 1, "width": 1, "values": 7},
        {"height": 2, "width": 1, "values": "AA=="},
        {"height": True, "width": 1, "values": "AA=="},
        {"height": -1, "width": -1, "values": "AA=="},
    ],
)
def test_a_heatmap_of_another_form_is_refused(heatmap):
    with pytest.raises(BadAnswer):
        wire.parse_heatmap(heatmap)


@pytest.mark.parametrize("error", [None, [], "broken", {}])
def test_an_error_entry_of_another_form_has_no_code(error):
    assert wire.parse_error({"error": error}) == ("", "", {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"[]",
        b"[[]]",
        b"null",
        b"{}",
        b'{"results":{}}',
        b'{"results":[]}',
        b'{"results":[1]}',
        b'{"results":[{"class":"cat"}]}',
        b'{"results":[{"error":{}},{"error":{}}]}',
        b"[" * 100_000,
    ],
)
def test_an_answer_without_an_entry_for_the_image_is_refused(content):
    with pytest.raises(BadAnswer):
        wire.parse_results(content, 1)


def test_a_number_that_is_not_finite_is_not_sent():
    with pytest.raises(ValueError, match="JSON"):
        wire.dump_json({"confidence": float("nan")})


def test_a_header_written_by_the_first_release_means_the_same():
    header = '{"id":"r","deadline":1764000000000,"top_k":3,"traceparent":"00-1-2-01"}'
    assert wire.parse_options(header) == Options("r", 1764000000000, "00-1-2-01", 3)


def test_every_schema_of_a_contract_that_is_readable_has_its_wire():
    assert wire.WIRES == {1: 1, 2: 1, 3: 2}
    assert set(model.READABLE) == set(wire.WIRES)
