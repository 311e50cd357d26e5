"""A browser in front of the real stack: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

# The fixtures of the whole stack, which pytest shares only with tests below tests/integration.
from tests.integration.conftest import (  # noqa: F401
    free_ports,
    make_stack,
    model_source,
    pack_again,
    stack,
    wait_until,
    write_untrained,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Locator

    from tests.integration.conftest import Stack

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "samples"
CAT, SHIP = SAMPLES / "cat" / "9.png", SAMPLES / "ship" / "2.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=20_000)  # a busy machine with two cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")
            item.add_marker("server")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.fail("no Chromium on PATH; install it: apt-get install chromium", pytrace=False)
    # Chromium's sandbox needs rights that root in a container does not have; the pages are our own.
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    options += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, stack: Stack) -> Iterator[Callable[..., Page]]:  # noqa: F811 — the fixture above
    """Yield `open_page(path="/", base=…, **options of the browser's context)`.

    In the end the test fails if a page had an error on its console, or asked another host.
    """
    wrong: list[str] = []
    with contextlib.ExitStack() as contexts:

        def open_one(path: str = "/", *, base: str = stack.gateway, may_fail: bool = False, **options: object) -> Page:
            context = browser.new_context(**options)
            contexts.callback(context.close)
            page = context.new_page()
            page.on("request", lambda request: is_own(request.url, base) or wrong.append(f"request: {request.url}"))
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            if not may_fail:
                page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
            page.goto(base + path)
            return page

        yield open_one
    assert wrong == []


def choose(page: Page, *images: Path) -> None:
    """Choose images as a person does with the file dialog."""
    page.locator("input[type=file]").first.set_input_files(images)


def answer(page: Page) -> Locator:
    """Return the element that holds the top class."""
    return page.get_by_test_id("answer")


def is_own(url: str, base: str) -> bool:
    """Return True if only this gateway or the page itself is asked."""
    return url.startswith((base + "/", "blob:" + base, "data:"))


@pytest.fixture
def start_gateway(stack: Stack) -> Iterator[Callable[..., tuple[str, subprocess.Popen]]]:  # noqa: F811
    """Yield `start_gateway(KEYS=…)`: one more gateway before the stack's agent, with its address and its process."""
    with contextlib.ExitStack() as started:

        def start(**settings: str) -> tuple[str, subprocess.Popen]:
            named = {"AGENTS": stack.agent, "PLAN": str(stack.home / "plan.json"), "WORKERS": "1", **settings}
            port = named.setdefault("PORT", str(free_ports(1)[0]))
            chosen = {f"GATEWAY_{name}": value for name, value in named.items()}
            process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"],
                cwd=ROOT,
                env=stack.environment | chosen,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            started.callback(stop, process)
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200, 60)
            return address, process

        yield start


def stop(process: subprocess.Popen) -> None:
    """Stop the gateway, if it runs."""
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
