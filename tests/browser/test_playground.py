"""The playground, as a person uses it."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from playwright.sync_api import expect

from tests.browser.conftest import CAT, SAMPLES, SHIP, answer, choose

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Page


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
    expect(page.locator("#knows")).to_contain_text("deer, dog, frog")
    page.get_by_role("button", name="frog").click()
    expect(answer(page)).to_have_text("frog")


def test_a_class_of_the_bars_gets_its_own_heatmap(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    expect(page.locator("#stage")).to_have_attribute("aria-label", "9.png with the heatmap of cat")
    of_cat = pixels(page, "#stage")
    second = page.locator("#bars .name").nth(1).inner_text()
    page.locator("#bars button").nth(1).click()
    expect(page.locator("#stage")).to_have_attribute("aria-label", f"9.png with the heatmap of {second}")
    assert pixels(page, "#stage") != of_cat


def test_two_classes_are_explained_side_by_side(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("button", name="a cat and a ship side by side").click()
    expect(page.locator("#why-text-both")).not_to_be_empty()
    chosen = {page.get_by_label(f"{which} class").input_value() for which in ("First", "Second")}
    assert chosen == {"cat", "ship"}
    assert pixels(page, "#why-canvas-a") != pixels(page, "#why-canvas-b")
    page.get_by_label("Second class").select_option("frog")
    expect(page.locator("#why-text-b")).to_contain_text("frog")


def test_a_dropped_image_is_answered(open_page: Callable[..., Page]) -> None:
    page = open_page()
    data = base64.b64encode(SHIP.read_bytes()).decode()
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "ship.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
        }""",
        data,
    )
    expect(answer(page)).to_have_text("ship")


def test_a_dropped_folder_becomes_a_gallery(open_page: Callable[..., Page], tmp_path: Path) -> None:
    for image in (CAT, SHIP):
        folder = tmp_path / "photos" / image.parent.name
        folder.mkdir(parents=True)
        (folder / image.name).write_bytes(image.read_bytes())
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    page = open_page()
    drop(page, tmp_path / "photos")
    expect(page.locator("#gallery-state")).to_have_text("2 images")
    expect(page.locator("#gallery-list strong")).to_have_count(2)
    assert sorted(page.locator("#gallery-list strong").all_inner_texts()) == ["cat", "ship"]


def test_what_is_no_image_file_is_refused_when_it_is_dropped_or_pasted(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page()
    drop(page, tmp_path)
    expect(page.get_by_role("alert")).to_contain_text("Drop images or a folder of images")
    page.evaluate(
        "document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: new DataTransfer(), bubbles: true}))"
    )
    expect(page.get_by_role("alert")).to_contain_text("The clipboard holds no image")


def drop(page: Page, *paths: Path) -> None:
    """Drop files or folders of the disk onto the page."""
    browser = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})


def test_a_pasted_image_is_answered(open_page: Callable[..., Page]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    data = base64.b64encode(SHIP.read_bytes()).decode()
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
            const image = new Blob([bytes], { type: "image/png" });
            return navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
        }""",
        data,
    )
    page.keyboard.press("Control+V")
    expect(answer(page)).to_have_text("ship")


def test_a_picture_of_the_camera_is_answered(open_page: Callable[..., Page]) -> None:
    page = open_page(permissions=["camera"])
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(answer(page)).not_to_be_empty()
    expect(page.locator("#camera-dialog")).to_be_hidden()


def test_what_is_erased_changes_the_answer_at_once_and_restoring_brings_it_back(
    open_page: Callable[..., Page],
) -> None:
    page = open_page()
    choose(page, CAT)
    whole = sure(page)
    page.get_by_role("button", name="Eraser").click()
    page.locator("#brush").fill("50")
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=4)
    expect(page.locator("#sure")).not_to_have_text(whole)  # while the button is still down
    expect(page.locator("#changed")).to_contain_text("cat")
    page.mouse.up()
    page.get_by_role("button", name="Restore the image").click()
    expect(page.locator("#sure")).to_have_text(whole)
    expect(page.locator("#changed")).to_be_hidden()


def test_hiding_the_hot_region_changes_the_answer(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    whole = sure(page)
    page.get_by_role("button", name="Hide the hot region").click()
    expect(page.locator("#sure")).not_to_have_text(whole)
    said = answer(page).inner_text()
    expect(page.locator("#target option").first).to_have_text(f"{said} (the answer)")
    expect(page.get_by_label("First class")).to_have_value(said)


def test_the_eraser_works_by_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    whole = sure(page)
    page.get_by_role("button", name="Eraser").press("Enter")
    page.locator("#brush").fill("50")
    page.locator("#stage").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    expect(page.locator("#sure")).not_to_have_text(whole)


def test_many_images_become_a_gallery_with_the_least_certain_first(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    no_image = tmp_path / "notes.txt"
    no_image.write_text("no image")
    images = sorted(SAMPLES.glob("*/[3-6].png"))
    page = open_page()
    choose(page, *images, no_image)
    expect(page.locator("#gallery-state")).to_have_text(f"{len(images) + 1} images")
    captions = page.locator("#gallery-list .caption").all_inner_texts()
    assert "no known image" in captions[0]
    certain = [("unfamiliar" not in text, float(re.search(r"([\d.]+)\s%", text)[1])) for text in captions[1:]]
    assert certain == sorted(certain)  # unfamiliar images first
    page.get_by_label("Sort").select_option("certain")
    expect(page.locator("#gallery-list .caption").last).to_contain_text("no known image")
    expect(page.locator("#gallery-list .unseen")).to_have_text("notes.txt")  # in place of a broken picture
    page.locator("#gallery-list button").first.click()
    expect(answer(page)).to_have_text(page.locator("#gallery-list strong").first.inner_text())


def test_an_image_that_cannot_be_read_is_refused_with_a_sentence(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(CAT.read_bytes()[:300])
    page = open_page(may_fail=True)
    choose(page, broken)
    expect(page.get_by_role("alert")).to_contain_text("send a whole")
    expect(page.locator("#work")).to_be_hidden()
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_file_that_is_no_image_is_refused_with_a_sentence_about_the_file(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    page = open_page(may_fail=True)
    choose(page, text)
    expect(page.get_by_role("alert")).to_contain_text("The bytes are no known image: send a whole PNG")


def test_a_file_that_is_larger_than_the_gateway_takes_is_sent_as_a_smaller_copy(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large)
    assert large.stat().st_size > 7_000_000
    page = open_page()
    choose(page, large)
    expect(answer(page)).not_to_be_empty()
    expect(page.locator("#shrunk")).to_be_visible()
    choose(page, large, CAT)
    expect(page.locator("#gallery-list strong")).to_have_count(2)
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    expect(page.locator("#shrunk")).to_be_hidden()


def test_a_file_that_has_gone_is_not_taken_for_a_server_that_is_down(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    image = tmp_path / "cat.png"
    image.write_bytes(CAT.read_bytes())
    page = open_page(may_fail=True)
    choose(page, image)
    expect(page.locator("#why-text-both")).not_to_be_empty()
    image.unlink()
    page.locator("#bars button").nth(1).click()
    expect(page.get_by_role("alert")).to_contain_text("The file cannot be read")


def test_two_images_stand_side_by_side(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    page.get_by_label("with another image").set_input_files(SHIP)
    expect(page.locator("#compare-pair .said")).to_have_text(["cat", "ship"])


def test_the_last_call_stands_there_as_code_with_its_times(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    page.locator("#target").select_option("dog")
    expect(page.locator("#code")).to_contain_text("target=dog")
    page.get_by_role("tab", name="curl").press("ArrowRight")
    expect(page.locator("#code")).to_contain_text("from gradserve import Client")
    compile(page.locator("#code").inner_text(), "shown on the page", "exec")
    page.get_by_role("tab", name="Python").press("ArrowRight")
    expect(page.locator("#code")).to_contain_text("await post(")
    expect(page.locator("#time-predict")).to_contain_text("the model")


def sure(page: Page) -> str:
    """Return the confidence that the page shows once image and heatmap are answered."""
    expect(page.locator("#hide-hot")).to_be_enabled()
    return page.locator("#sure").inner_text()


def test_a_wrong_answer_can_be_reported_where_the_gateway_takes_feedback(
    open_page: Callable[..., Page], start_gateway: Callable[..., tuple], tmp_path: Path
) -> None:
    base, _ = start_gateway(FEEDBACK_FILE=str(tmp_path / "feedback.db"))
    page = open_page(base=base)
    choose(page, CAT)
    page.get_by_label("Wrong? It is").select_option("dog")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#feedback-sent")).to_contain_text("noted as dog")
    choose(page, SHIP)
    expect(answer(page)).to_have_text("ship")
    expect(page.get_by_label("Wrong? It is")).to_have_value(page.locator("#bars .name").nth(1).inner_text())


def test_feedback_is_not_offered_where_the_gateway_takes_none(open_page: Callable[..., Page]) -> None:
    page = open_page()
    choose(page, CAT)
    sure(page)
    expect(page.locator("#feedback")).to_be_hidden()
