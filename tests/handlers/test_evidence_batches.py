"""Any mix of predictions and explanations: every image gets the answer that it gets alone."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from contracts.wire import FRAMES_TYPE, join_frames, parse_heatmap
from handlers.image_handler import ImageHandler

FAR, PAST = 4_000_000_000_000, 1


def noise(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*rng.integers(4, 50, 2), 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


GOOD = tuple(map(noise, range(4)))
images = st.sampled_from(GOOD) | st.sampled_from((b"", b"text", GOOD[0][:60]))
explained = st.fixed_dictionaries(
    {"explain": st.just(value=True)},
    optional={
        "target": st.sampled_from([0, 3, 9, 99]),
        "method": st.sampled_from(["cam", "sharpcam", "contrastcam", "magic"]),
        "coverage": st.sampled_from([0.5, 0.9]),
        "test": st.just(value=True),
        "similar": st.sampled_from([0, 2]),
    },
)
pairs = st.tuples(images, st.just({}) | explained)
rows = st.tuples(st.lists(pairs, min_size=1, max_size=6), st.sampled_from([None, FAR, FAR, PAST]))


@pytest.fixture(scope="module")
def ask(evident, context):
    """Sends rows of ([(image, what is asked of it)], deadline) as one batch; gives the entries of each row."""
    handler = ImageHandler()
    handler._model = evident

    def ask(*batch) -> list[list[dict]]:
        headers, parts = [], []
        for asked, deadline in batch:
            options = {"format": "json", "images": [wanted for _, wanted in asked]}
            header = json.dumps(options | ({"deadline": deadline} if deadline else {}))
            headers.append({"x-gradserve": header, "body": {"content-type": FRAMES_TYPE}})
            parts.append({"body": bytearray(join_frames([image for image, _ in asked]))})
        return [json.loads(body)["results"] for body in handler.handle(parts, context(*headers))]

    return ask


@pytest.fixture(scope="module")
def alone(ask):
    """Gives the answer to one image that nothing else is sent with."""
    known: dict[tuple, dict] = {}

    def alone(image: bytes, wanted: dict) -> dict:
        key = (image, json.dumps(wanted, sort_keys=True))
        if key not in known:
            ((known[key],),) = ask(([(image, wanted)], None))
        return known[key]

    return alone


def hold(entry: dict, expected: dict) -> None:
    assert entry.keys() == expected.keys()
    if "error" in expected:
        assert entry["error"]["code"] == expected["error"]["code"]
        return
    assert entry["class"] == expected["class"]
    assert entry["familiar"] == expected["familiar"]
    assert entry["confidence"] == pytest.approx(expected["confidence"], abs=2e-3)
    if "heatmap" not in expected:
        return
    assert entry["target"]["class"] == expected["target"]["class"]
    assert entry["target"]["confidence"] == pytest.approx(expected["target"]["confidence"], abs=2e-3)
    assert entry["strength"] == pytest.approx(expected["strength"], rel=0.01, abs=1e-3)
    heat = [
        np.frombuffer(b"".join(parse_heatmap(one["heatmap"])), dtype=np.uint8).astype(int) for one in (entry, expected)
    ]
    assert np.abs(heat[0] - heat[1]).max() <= 3
    assert [one["class"] for one in entry["similar"]] == [one["class"] for one in expected["similar"]]
    assert [one["class"] for one in entry.get("classes", [])] == [one["class"] for one in expected.get("classes", [])]
    for name in {"kept", "removed"} & set(expected.get("test", ())):
        assert entry["test"][name] == pytest.approx(expected["test"][name], abs=0.02)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(batch=st.lists(rows, min_size=1, max_size=6))
def test_every_image_of_any_mix_gets_the_answer_that_it_gets_alone(batch, ask, alone):
    for (asked, deadline), entries in zip(batch, ask(*batch), strict=True):
        assert len(entries) == len(asked)
        if deadline == PAST:
            assert {entry["error"]["code"] for entry in entries} == {"deadline_passed"}
            continue
        for (image, wanted), entry in zip(asked, entries, strict=True):
            hold(entry, alone(image, wanted))


def test_the_answers_that_are_compared_differ(alone):
    """Otherwise a handler that mixed images up would pass."""
    answers = [alone(image, {"explain": True, "target": 3, "method": "cam"}) for image in GOOD]
    assert len({answer["confidence"] for answer in answers}) == len(GOOD)
    assert len({answer["heatmap"]["values"] for answer in answers}) == len(GOOD)
