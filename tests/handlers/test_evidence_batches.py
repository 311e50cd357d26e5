"""Any mix of predictions and explanations: every image gets the answer that it gets alone."""

from __future__ import annotations

import io
import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from contracts.wire import FRAMES_TYPE, join_frames, parse_about, parse_heatmap
from handlers.evidence.archive_evidence import ArchiveEvidence
from handlers.evidence.familiar import familiarity_scores
from handlers.image_handler import ImageHandler
from handlers.model import ServedModel
from handlers.preprocess import decode_image, normalise, prepare

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
        "method": st.sampled_from(["cam", "sharpcam", "contrastcam", "gradcam", "layercam", "magic"]),
        "coverage": st.sampled_from([0.5, 0.9]),
        "test": st.just(value=True),
        "similar": st.sampled_from([0, 2]),
    },
)
pairs = st.tuples(images, st.just({}) | explained)
asked = st.lists(pairs, min_size=1, max_size=6) | st.lists(pairs, min_size=1, max_size=1)
rows = st.tuples(asked, st.sampled_from([None, FAR, FAR, PAST]), st.sampled_from(["json", "png"]))


@pytest.fixture(scope="module")
def served(evident) -> ServedModel:
    """The model with evidence that differs between the good images: in familiarity and in answer sets."""
    settings, size = evident.contract.evidence.familiar, evident.contract.input
    pixels = np.stack([prepare(decode_image(image).image, size) for image in GOOD])
    outputs = evident.engine.run(normalise(pixels, size))
    store = dict(evident.evidence._store)
    scores = familiarity_scores(settings.method, store, settings.neighbours, outputs.probabilities, outputs.features)
    store["familiarity_scores"] = np.linspace(scores.min(), scores.max(), 100, dtype=np.float32)
    store["answer_set_scores"] = np.linspace(0.3, 0.999, 99, dtype=np.float32)
    evidence = ArchiveEvidence(evident.contract, store)
    return ServedModel(evident.contract, evident.engine, evident.load_explainer, evidence)


@pytest.fixture(scope="module")
def ask(served, context):
    """Sends rows of ([(image, what is asked of it)], deadline, format) as one batch; gives the entries of each row.

    The entry of an overlay is the facts in its text, and its `pixels`.
    """
    handler = ImageHandler()
    handler._model = served

    def ask(*batch) -> list[list[dict]]:
        headers, parts = [], []
        for wanted, deadline, form in batch:
            options = {"format": form, "images": [of_image for _, of_image in wanted]}
            header = json.dumps(options | ({"deadline": deadline} if deadline else {}))
            headers.append({"x-gradserve": header, "body": {"content-type": FRAMES_TYPE}})
            parts.append({"body": bytearray(join_frames([image for image, _ in wanted]))})
        return [read(body) for body in handler.handle(parts, context(*headers))]

    return ask


def read(body: bytes) -> list[dict]:
    if body.startswith(b"\x89PNG"):
        return [parse_about(body) | {"pixels": np.asarray(Image.open(io.BytesIO(body))).astype(int)}]
    return json.loads(body)["results"]


@pytest.fixture(scope="module")
def alone(ask):
    """Gives the answer to one image that nothing else is sent with."""
    known: dict[tuple, dict] = {}

    def alone(image: bytes, wanted: dict, form: str = "json") -> dict:
        key = (image, json.dumps(wanted, sort_keys=True), form)
        if key not in known:
            ((known[key],),) = ask(([(image, wanted)], None, form))
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
    if "target" not in expected:
        return
    assert entry["target"]["class"] == expected["target"]["class"]
    assert entry["target"]["confidence"] == pytest.approx(expected["target"]["confidence"], abs=2e-3)
    assert entry["method"] == expected["method"]
    assert entry["strength"] == pytest.approx(expected["strength"], rel=0.01, abs=1e-3)
    if "pixels" in expected:
        assert entry["caption"] == expected["caption"]
        assert np.abs(entry["pixels"] - expected["pixels"]).max() <= 6
        return
    assert entry["familiarity"] == pytest.approx(expected["familiarity"], abs=0.03)
    heat = [
        np.frombuffer(b"".join(parse_heatmap(one["heatmap"])), dtype=np.uint8).astype(int) for one in (entry, expected)
    ]
    assert np.abs(heat[0] - heat[1]).max() <= 3
    for own, other in zip(entry["similar"], expected["similar"], strict=True):
        assert own["similarity"] == pytest.approx(other["similarity"], abs=1e-3)
    assert [one["id"] for one in entry["similar"]] == [one["id"] for one in expected["similar"]]
    assert [one["class"] for one in entry.get("classes", [])] == [one["class"] for one in expected.get("classes", [])]
    for name in {"kept", "removed"} & set(expected.get("test", ())):
        assert entry["test"][name] == pytest.approx(expected["test"][name], abs=0.02)


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(batch=st.lists(rows, min_size=1, max_size=6))
def test_every_image_of_any_mix_gets_the_answer_that_it_gets_alone(batch, ask, alone):
    for (wanted, deadline, form), entries in zip(batch, ask(*batch), strict=True):
        assert len(entries) == len(wanted)
        if deadline == PAST:
            assert {entry["error"]["code"] for entry in entries} == {"deadline_passed"}
            continue
        for (image, of_image), entry in zip(wanted, entries, strict=True):
            hold(entry, alone(image, of_image, form if len(wanted) == 1 else "json"))


def test_the_answers_that_are_compared_differ(alone):
    """Otherwise a handler that mixed images up would pass."""
    wanted = {"explain": True, "target": 3, "method": "cam", "coverage": 0.5, "similar": 1}
    answers = [alone(image, wanted) for image in GOOD]
    assert len({answer["confidence"] for answer in answers}) == len(GOOD)
    assert len({answer["heatmap"]["values"] for answer in answers}) == len(GOOD)
    assert len({answer["familiarity"] for answer in answers}) == len(GOOD)
    assert {answer["familiar"] for answer in answers} == {True, False}
    assert len({answer["similar"][0]["id"] for answer in answers}) > 1
    sets = [alone(GOOD[0], wanted | {"coverage": coverage})["classes"] for coverage in (0.5, 0.9)]
    assert len(sets[0]) < len(sets[1])
    overlays = [alone(image, {"explain": True, "target": 3, "method": method}, "png") for image, method in PICTURED]
    for one, other in combinations(overlays, 2):
        assert one["pixels"].shape != other["pixels"].shape or np.abs(one["pixels"] - other["pixels"]).max() > 20


PICTURED = [(GOOD[0], "cam"), (GOOD[0], "gradcam++"), (GOOD[1], "cam"), (GOOD[2], "cam")]
