"""The playground, as a person uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Locator, Page

SAMPLES = Path(__file__).parents[1] / "samples"
CAT, SHIP = SAMPLES / "cat" / "9.png", SAMPLES / "ship" / "2.png"


def choose(page: Page, *images: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(images)


def answer(page: Page) -> Locator:
    return page.get_by_test_id("answer")


def pixels(page: Page, canvas: str) -> str:
    """Return what a canvas shows."""
    return page.locator(canvas).evaluate("canvas => canvas.toDataURL()")


def test_a_chosen_image_is_answered_with_its_heatmap(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    expect(page.locator("#stage")).to_have_attribute("aria-label", "9.png with the heatmap of cat")
    with_heat = pixels(page, "#stage")
    page.locator("#opacity").fill("0")
    assert pixels(page, "#stage") != with_heat


def test_a_sample_is_answered(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="frog").click()
    expect(answer(page)).to_have_text("frog")


def test_a_class_of_the_bars_gets_its_own_heatmap(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="a cat and a ship side by side").click()
    expect(page.locator("#stage")).to_have_attribute("aria-label", "cat-and-ship.png with the heatmap of cat")
    of_cat = pixels(page, "#stage")
    page.locator("#bars").get_by_role("button", name="ship").click()
    expect(page.locator("#stage")).to_have_attribute("aria-label", "cat-and-ship.png with the heatmap of ship")
    assert pixels(page, "#stage") != of_cat


def test_two_classes_are_explained_side_by_side(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="a cat and a ship side by side").click()
    expect(page.locator("#why-text-a")).to_contain_text("cat")
    expect(page.locator("#why-text-b")).to_contain_text("ship")
    assert pixels(page, "#why-canvas-a") != pixels(page, "#why-canvas-b")
    page.get_by_label("Second class").select_option("frog")
    expect(page.locator("#why-text-b")).to_contain_text("frog")
