from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from contracts.wire import ImageOptions, Options, parse_about, parse_heatmap
from handlers.evidence.heatmaps import FORWARD_METHODS
from handlers.overlay import draw_overlay
from handlers.wire import Row

SIZE = (48, 36)
ALPHA = 0.7


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
