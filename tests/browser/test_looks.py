"""Accessibility, sizes and colours of the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect

from tests.browser.conftest import CAT, SAMPLES, answer, choose

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Page

MOST_BYTES = 150_000
PHONE = {"width": 375, "height": 740}
DESK = {"width": 1280, "height": 900}


@pytest.mark.parametrize(("scheme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light desk", "dark phone"])
def test_the_playground_breaks_no_rule_of_accessibility_and_does_not_overflow(
    open_page: Callable[..., Page], scheme: str, size: dict
) -> None:
    page = open_page(color_scheme=scheme, viewport=size)
    expect(page.get_by_role("button", name="frog")).to_be_visible()
    check(page, size)
    choose(page, *sorted(SAMPLES.glob("*/3.png")))
    expect(page.locator("#gallery-state")).to_have_text("10 images")
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    expect(page.locator("#why-text-both")).not_to_be_empty()
    page.get_by_role("button", name="Eraser").click()
    page.get_by_role("button", name="Hide the hot region").click()
    expect(page.locator("#changed")).to_be_visible()
    check(page, size)


def test_the_operations_view_breaks_no_rule_of_accessibility_and_does_not_overflow(
    open_page: Callable[..., Page],
) -> None:
    page = open_page("/ops", viewport=PHONE)
    expect(page.locator("#charts figure")).not_to_have_count(0)
    check(page, PHONE)


def check(page: Page, size: dict) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_the_page_is_dark_where_the_person_wants_it_dark(open_page: Callable[..., Page]) -> None:
    lightness = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        colour = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        lightness[scheme] = sum(int(part) for part in colour[4:-1].split(","))
    assert lightness["dark"] < 200 < 600 < lightness["light"]


def test_the_answer_comes_before_the_tools_on_a_phone(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport=PHONE)
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    tops = [page.locator(part).bounding_box()["y"] for part in ("#stage", "#answer", "#erase")]
    assert tops == sorted(tops)


def test_a_tall_image_is_seen_as_a_whole(open_page: Callable[..., Page], tmp_path: Path) -> None:
    tall = tmp_path / "tall.png"
    with Image.open(CAT) as image:
        image.resize((100, 400)).save(tall)
    page = open_page(viewport=DESK)
    choose(page, tall)
    expect(page.locator("#why-text-both")).not_to_be_empty()
    for canvas in ("#stage", "#why-canvas-a", "#why-canvas-both"):
        box = page.locator(canvas).bounding_box()
        assert box["height"] <= DESK["height"]
        assert abs(box["height"] / box["width"] - 4) < 0.1


def test_all_that_the_page_loads_is_small(open_page: Callable[..., Page]) -> None:
    page = open_page("/ops")
    sizes = {}
    page.on("response", lambda response: sizes.update({response.url: len(response.body())}))
    page.goto(page.url.removesuffix("ops"))
    page.wait_for_load_state("networkidle")
    assert len(sizes) > 10
    assert sum(sizes.values()) <= MOST_BYTES
