"""Explanations in the answers of a served model, with and without evidence in the archive."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from contracts.wire import ImageOptions, Options, parse_about, parse_heatmap
from handlers.evidence.explanations import NO_STRENGTH, NO_SUPPORT, Explanations
from handlers.evidence.heatmaps import FORWARD_METHODS, heatmap
from handlers.jobs import jobs_of
from handlers.overlay import draw_overlay
from handlers.wire import Row

SIZE = (48, 36)
ALPHA = 0.7


def entry_of(served, data: bytes, **asked: object) -> dict:
    """Return the entry of one image that is asked about in wire 2."""
    row = Row("predict", Options(images=(ImageOptions(explain=True, **asked),), format="json"), [data])
    (answer,) = served.answer([row])
    (entry,) = json.loads(answer.body)["results"]
    return entry


def overlay_of(served, data: bytes, options: Options) -> tuple[bytes, Image.Image]:
    (answer,) = served.answer([Row("explain", options, [data])])
    assert answer.content_type == "image/png"
    return answer.body, Image.open(io.BytesIO(answer.body))


def predicted(served, data: bytes) -> dict:
    (answer,) = served.answer([Row("predict", images=[data])])
    return json.loads(answer.body)["results"][0]


def test_an_explanations_class_and_confidence_are_the_predictions(model, noise, encode):
    entry = entry_of(model, encode(noise), target=8)
    assert entry["target"]["class"] == "ship"
    assert {name: entry[name] for name in ("class", "confidence")} == predicted(model, encode(noise))["top"][0]


def test_the_heatmap_explains_the_top_class_unless_asked_for_another(model, noise, encode):
    entry = entry_of(model, encode(noise))
    assert entry["target"] == {name: entry[name] for name in ("class", "confidence")}
    assert [len(row) for row in parse_heatmap(entry["heatmap"])] == [24] * 16


def test_a_method_with_a_backward_pass_has_the_strength_of_cam(model, noise, encode):
    for target in range(len(model.contract.classes)):
        entry = entry_of(model, encode(noise), method="gradcam", target=target)
        assert (entry["method"], entry["heatmap"]["height"]) == ("gradcam", 16)
        of_cam = entry_of(model, encode(noise), method="cam", target=target)["strength"]
        assert entry["strength"] == (of_cam if heat_of(entry).any() else 0)


def test_a_version_without_class_maps_tells_no_strength_of_a_backward_pass(model, noise, encode):
    class WithoutMaps:
        """The model's engine as of a version that gives no class maps."""

        buffer = staticmethod(model.engine.buffer)

        def run(self, images):
            return model.engine.run(images)._replace(maps=None, sharpness=None)

    own = type(model)(model.contract, WithoutMaps(), model.load_explainer, model.evidence)
    answered = entry_of(own, encode(noise), method="gradcam")
    assert answered["strength"] == {"unavailable": NO_STRENGTH}
    for target in set(model.contract.classes) - {answered["class"]}:
        data, _ = overlay_of(own, encode(noise), Options(method="gradcam", target=target))
        about = parse_about(data)
        if about["strength"] != 0:
            assert about["caption"] == f"{target} by gradcam, scaled to its own maximum"


@pytest.mark.parametrize(("form", "passes"), [("json", 1), ("png", 2)])
def test_only_an_overlay_computes_the_strength_of_the_class_answered(form, passes, model, noise, encode, monkeypatch):
    computed = []

    def count(outputs, targets, *rest):
        computed.append(len(targets))
        return heatmap(outputs, targets, *rest)

    monkeypatch.setattr("handlers.evidence.explanations.heatmap", count)
    answered = model.contract.classes.index(entry_of(model, encode(noise), method="cam")["class"])
    computed.clear()
    images = (ImageOptions(explain=True, method="cam", target=(answered + 1) % 10),)
    model.answer([Row("explain", Options(images=images, format=form), [encode(noise)])])
    assert computed == [1] * passes
    computed.clear()
    images = (ImageOptions(explain=True, method="cam", target=answered),)
    model.answer([Row("explain", Options(images=images, format=form), [encode(noise)])])
    assert computed == [1]


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_methods_of_the_forward_pass_load_no_explainer(method, model, noise, encode):
    def refuse():
        raise AssertionError("the explainer was loaded")

    own = type(model)(model.contract, model.engine, refuse, model.evidence)
    assert entry_of(own, encode(noise), method=method)["method"] == method


def test_an_explanation_without_packed_evidence_says_so_in_each_part(model, noise, encode):
    entry = entry_of(model, encode(noise), method="contrastcam", coverage=0.9, test=True)
    for part in ("familiar", "familiarity", "similar", "classes"):
        assert "packed without evidence" in entry[part]["unavailable"]
    assert set(entry["test"]) in ({"kept", "removed", "verdict"}, {"unavailable"})


def test_a_heatmap_without_heat_has_no_region_to_test(model, noise, encode):
    class Unsupported:
        """The model's engine, in whose class maps nothing supports any class."""

        buffer = staticmethod(model.engine.buffer)

        def run(self, images):
            outputs = model.engine.run(images)
            return outputs._replace(maps=-np.abs(outputs.maps))

    own = type(model)(model.contract, Unsupported(), model.load_explainer, model.evidence)
    entry = entry_of(own, encode(noise), method="cam", test=True)
    assert (entry["strength"], entry["test"]) == (0, {"unavailable": NO_SUPPORT})


def test_answer_set_and_test_are_given_only_if_asked_for(evident, noise, encode):
    assert not {"classes", "test"} & entry_of(evident, encode(noise), method="cam").keys()
    asked = entry_of(evident, encode(noise), method="cam", coverage=0.9, test=True, similar=0)
    assert isinstance(asked["classes"], list)
    assert "test" in asked
    assert asked["similar"] == []


def test_an_unfamiliar_image_is_said_to_be_so_in_the_overlays_caption(evident, noise, encode):
    data, image = overlay_of(evident, encode(noise), Options(target="cat", method="sharpcam"))
    about = parse_about(data)
    assert about["familiar"] is False
    assert about["caption"] == image.text["Description"] == "cat by sharpcam; unfamiliar image"
    assert image.size == (40, 30)


def test_a_large_jpegs_overlay_is_sharp_and_its_answer_is_the_predictions(model, encode):
    stripes = np.zeros((1500, 2000, 3), dtype=np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = 255
    data = encode(stripes, "JPEG", quality=95)
    _, image = overlay_of(model, data, Options(alpha=0))
    pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (768, 1024)
    assert pixels[384].std() > 60  # a draft of the network's size would be even grey
    assert entry_of(model, data)["confidence"] == predicted(model, data)["confidence"]


@pytest.mark.parametrize(
    ("asked", "code"), [({"target": 99}, "unknown_target"), ({"method": "magic"}, "unknown_method")]
)
def test_an_unknown_class_or_method_is_refused(asked, code, model, noise, encode):
    assert entry_of(model, encode(noise), **asked)["error"]["code"] == code


def test_what_is_asked_of_an_image_counts_more_than_what_is_asked_of_its_row(model):
    explanations = Explanations(model.contract, model.engine, model.evidence, model.load_explainer)
    row = Row("explain", Options(target="dog", method="gradcam"), [b""])
    (job,) = jobs_of(row)
    explanations.choose(job)
    assert (model.contract.classes[job.target], job.method) == ("dog", "gradcam")
    row.options = row.options._replace(images=(ImageOptions(explain=True, target=3, method="cam"),))
    (job,) = jobs_of(row)
    explanations.choose(job)
    assert (model.contract.classes[job.target], job.method) == ("cat", "cam")


@pytest.fixture
def explained(model, noise, encode):
    """Gives the entry and the overlay of a heatmap of noise."""

    def explained(target: int, method: str) -> tuple[dict, bytes]:
        asked = (ImageOptions(True, target=target, method=method),)
        numbers, overlay = model.answer(
            [
                Row("explain", Options(images=asked, format="json"), [encode(noise)]),
                Row("explain", Options(images=asked, format="png", size=max(SIZE), alpha=ALPHA), [encode(noise)]),
            ]
        )
        return json.loads(numbers.body)["results"][0], overlay.body

    return explained


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


def heat_of(entry: dict) -> np.ndarray:
    levels = [np.frombuffer(row, np.uint8) for row in parse_heatmap(entry["heatmap"])]
    return np.stack(levels).astype(np.float32) / 255


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_an_overlay_is_as_hot_as_its_classs_evidence_beside_the_answered_classs(method, explained, model, noise):
    classes = model.contract.classes
    entries, overlays = zip(*(explained(target, method) for target in range(len(classes))), strict=True)
    answered = classes.index(entries[0]["class"])
    shares = [min(1.0, entry["strength"] / entries[answered]["strength"]) for entry in entries]
    assert min(shares) < 0.5 < max(shares), "otherwise this test proves little"
    for entry, overlay, share in zip(entries, overlays, shares, strict=True):
        expected = draw_overlay(Image.fromarray(noise), heat_of(entry) * share, size=SIZE, alpha=ALPHA)
        assert np.abs(pixels(overlay) - pixels(expected)).max() <= 5
        caption = parse_about(overlay)["caption"]
        assert caption.startswith(f"{entry['target']['class']} by {method}")
        dimmed = f", dimmed: {share:.0%} of the evidence for {entry['class']}"
        assert caption.endswith(dimmed if share < 1 else method)


def test_overlays_of_a_method_with_a_backward_pass_are_dimmed_by_the_closed_form(explained, model, noise):
    classes = model.contract.classes
    strengths = [explained(target, "cam")[0]["strength"] for target in range(len(classes))]
    entry, _ = explained(0, "gradcam")
    weakest, answered = int(np.argmin(strengths)), classes.index(entry["class"])
    entry, overlay = explained(weakest, "gradcam")
    share = strengths[weakest] / strengths[answered]
    expected = draw_overlay(Image.fromarray(noise), heat_of(entry) * share, size=SIZE, alpha=ALPHA)
    assert np.abs(pixels(overlay) - pixels(expected)).max() <= 5
    assert parse_about(overlay)["caption"] == (
        f"{classes[weakest]} by gradcam, dimmed: {share:.0%} of the evidence for {entry['class']}"
    )
