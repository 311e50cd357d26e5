"""The evidence that the archive holds, as the page shows it: familiarity, answer set, similar images, the test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import CAT, answer, choose
from tests.integration.conftest import RELEASED

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

HAS_EVIDENCE = bool(json.loads((RELEASED / "contract.json").read_text(encoding="utf-8")).get("evidence"))
pytestmark = pytest.mark.skipif(not HAS_EVIDENCE, reason="the released model was packed without evidence")


def test_an_unfamiliar_image_is_not_known(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    expect(page.locator("#similar")).to_be_visible()
    expect(page.get_by_text("I do not know this kind of image")).to_be_hidden()
    expect(page.locator("#answer-title")).to_have_text("The answer")
    page.get_by_role("button", name="a clock, which the model does not know").click()
    expect(page.get_by_text("I do not know this kind of image")).to_be_visible()
    expect(page.locator("#answer-title")).to_have_text("Its best guess")
    expect(page.locator("#set-text")).to_contain_text("promises nothing for this image")


def test_a_higher_coverage_needs_more_classes(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="a cat and a ship side by side").click()
    expect(page.locator("#set .chip")).to_have_count(1)
    page.get_by_label("Coverage").fill("99.9")
    expect(page.locator("#set .chip")).not_to_have_count(1)
    expect(page.locator("#set .chip").first).to_have_text(answer(page).inner_text())


def test_the_nearest_training_images_are_shown(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    images = page.locator("#similar-list img")
    expect(images).to_have_count(6)
    expect(page.locator("#similar-list figcaption").first).to_have_text("cat")
    for image in images.all():
        expect(image).to_have_js_property("naturalWidth", 32)


def test_the_heatmap_can_be_tested(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    page.get_by_role("button", name="Test the heatmap").click()
    expect(page.locator("#test-result")).to_contain_text("With only the hottest quarter, cat has")


@pytest.mark.parametrize("method", ["contrastcam", "gradcam"])
def test_a_class_with_little_evidence_is_dimmed_by_every_method(method: str, open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    expect(page.locator("#similar")).to_be_visible()
    if method != page.locator("#method option").first.inner_text():
        page.locator("#method").select_option(method)
    expect(page.locator("#dimmed")).to_be_hidden()
    page.locator("#target").select_option("ship")
    expect(page.locator("#dimmed")).to_contain_text("of that for cat")
    expect(page.locator("#why-text-b")).to_contain_text("Dimmed: its evidence is")
    page.locator("#target").select_option("")
    expect(page.locator("#dimmed")).to_be_hidden()
