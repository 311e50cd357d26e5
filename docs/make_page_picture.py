"""Draw docs/page.png, the page of a running gateway with a sample that holds two classes. Needs Chromium on PATH.

python docs/make_page_picture.py http://127.0.0.1:8000
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

SAMPLE = "a cat and a ship side by side"
SIZE = {"width": 1200, "height": 900}
MOST_BYTES = 400_000


def main(address: str) -> None:
    """Open the page, ask about the sample, and write what the browser shows beside this file."""
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport=SIZE, device_scale_factor=1)
        page.goto(address)
        ask(page)
        shown = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=box(page))))
        browser.close()
    picture = Path(__file__).with_name("page.png")
    shown.convert("RGB").save(picture, optimize=True)
    if picture.stat().st_size > MOST_BYTES:
        sys.exit(f"{picture} has {picture.stat().st_size} bytes, above {MOST_BYTES}: make SIZE smaller")


def ask(page: Page) -> None:
    """Click the sample and wait until everything about it is drawn."""
    page.get_by_role("button", name=SAMPLE).click()
    expect(page.locator("#why-text-both")).not_to_be_empty(timeout=30_000)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # the bars grow


def box(page: Page) -> dict[str, float]:
    """Return the part of the page from its top to the end of the section "Why … and not …?"."""
    why = page.locator("#why").bounding_box()
    return {"x": 0, "y": 0, "width": SIZE["width"], "height": why["y"] + why["height"] + 30}


if __name__ == "__main__":
    main(sys.argv[1])
