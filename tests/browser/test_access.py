"""Keys, and a server that does not answer."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from tests.browser.conftest import CAT, answer, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

SECRET = "a-key-for-this-test"
KEYS = f"someone:{hashlib.sha256(SECRET.encode()).hexdigest()}:predict+explain+read"


def test_a_wrong_key_is_asked_for_again_and_the_right_one_continues_the_call(
    open_page: Callable[..., Page], start_gateway: Callable[..., tuple]
) -> None:
    base, _ = start_gateway(AUTH="keys", KEYS=KEYS)
    page = open_page(base=base, may_fail=True)
    choose(page, CAT)
    dialog = page.get_by_role("dialog", name="API key")
    give_key(page, "wrong")
    expect(dialog).to_contain_text("unknown")
    give_key(page, SECRET)
    expect(answer(page)).to_have_text("cat")
    expect(page.locator("#version")).to_contain_text("stable")  # what the scope `read` shows
    page.reload()
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")  # the tab keeps the key
    expect(page.locator("#code")).to_contain_text("$GRADSERVE_KEY")
    assert SECRET not in page.content()


def test_a_caller_who_gives_no_key_reads_what_to_do(
    open_page: Callable[..., Page], start_gateway: Callable[..., tuple]
) -> None:
    base, _ = start_gateway(AUTH="keys", KEYS=KEYS)
    page = open_page(base=base, may_fail=True)
    choose(page, CAT)
    page.get_by_role("dialog", name="API key").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("API key")
    page.get_by_role("button", name="Try again").click()
    give_key(page, SECRET)
    expect(answer(page)).to_have_text("cat")


def test_operations_need_a_key_with_the_scope_read(
    open_page: Callable[..., Page], start_gateway: Callable[..., tuple]
) -> None:
    base, _ = start_gateway(AUTH="keys", KEYS=KEYS)
    page = open_page("/ops", base=base, may_fail=True)
    expect(page.locator("#data")).to_be_hidden()
    give_key(page, SECRET)
    expect(page.locator("#versions")).to_contain_text("stable")


def test_a_server_that_is_down_is_named_with_what_to_do(
    open_page: Callable[..., Page], start_gateway: Callable[..., tuple]
) -> None:
    base, process = start_gateway()
    page = open_page(base=base, may_fail=True)
    choose(page, CAT)
    expect(answer(page)).to_have_text("cat")
    process.terminate()
    process.wait(timeout=60)
    choose(page, CAT)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    expect(page.locator("#stage")).to_be_visible()  # the image, without the former one's answer, evidence and code
    for part in ("#answer", "#erase", "#how"):
        expect(page.locator(part)).to_be_hidden()
    start_gateway(PORT=base.rsplit(":", 1)[1])
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(answer(page)).to_have_text("cat")


def give_key(page: Page, key: str) -> None:
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Use this key").click()
