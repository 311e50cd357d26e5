"""Two versions: the choice between them on the page, and the operations view while a canary is tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser.conftest import CAT, answer, choose

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Page

    from tests.integration.conftest import Stack

CANARY = "1.0.7"


@pytest.fixture(scope="module")
def canary(stack: Stack, pack_again: Callable[..., Path]) -> str:
    """Return the version of a canary: the served model under another version."""
    deployed = stack.command("deploy", str(pack_again(CANARY)), "--canary", "50")
    assert deployed.returncode == 0, deployed.stderr
    return CANARY


def test_the_chosen_version_answers_and_stands_beside_the_other(
    open_page: Callable[..., Page], stack: Stack, canary: str
) -> None:
    stable = stack.plan()["stable"]["version"]
    page = open_page()
    choose(page, CAT)
    page.locator("#version").select_option(label=f"{canary} (canary)")
    expect(page.locator("#served")).to_contain_text(canary)
    expect(answer(page)).to_have_text("cat")
    page.get_by_label("with version").select_option(label=f"{stable} (stable)")
    expect(page.locator("#compare-pair figcaption")).to_contain_text([canary, stable])


def test_operations_show_the_canary_against_the_stable_version_live(
    open_page: Callable[..., Page], stack: Stack, canary: str
) -> None:
    page = open_page("/ops")
    expect(page.get_by_role("row", name=canary)).to_contain_text("50\u00a0%")
    image = CAT.read_bytes()
    for version in (canary, stack.plan()["stable"]["version"]):
        for _ in range(3):
            httpx.post(f"{stack.gateway}/predict", params={"version": version}, content=image).raise_for_status()
    httpx.get(f"{stack.gateway}/no-such-route")
    httpx.post(f"{stack.gateway}/predict", params={"version": canary}, content=image[:100])
    expect(page.locator("#trial-body")).to_contain_text("Share of the answers")
    expect(page.locator("#trial-body tr").first).not_to_contain_text("0")
    expect(page.locator("#charts path.canary")).not_to_have_count(0)
    expect(page.locator("#charts path.stable")).not_to_have_count(0)
    expect(page.locator("#refused")).to_contain_text("route_unknown")
    expect(page.locator("#refused")).to_contain_text("image_unreadable")
    # A caller's broken image is no failure of the version.
    expect(page.get_by_role("row", name="Failed answers").get_by_role("cell")).to_have_text(["0.00 %", "0.00 %"])
    expect(page.locator("#places")).to_contain_text("Predictions in flight")
