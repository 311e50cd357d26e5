"""Every exception becomes one problem document, and an unexpected one tells nothing of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import Stand

IMAGE = b"image-of-dog"


@pytest.mark.parametrize(("method", "route"), [("GET", "/nope"), ("POST", "/predict/"), ("GET", "/v2/nope")])
def test_an_unknown_route_is_404(stand: Stand, method: str, route: str, assert_problem: Callable[..., None]) -> None:
    assert_problem(stand.client.request(method, route), 404, "route_unknown")


def test_an_unknown_method_is_405_and_names_the_known_one(stand: Stand, assert_problem: Callable[..., None]) -> None:
    answer = stand.client.get("/predict")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_an_unexpected_exception_is_500_without_its_message(stand: Stand, assert_problem: Callable[..., None]) -> None:
    def fault(request: httpx.Request) -> httpx.Response:
        raise RuntimeError("a secret path /srv/models")

    stand.torchserve.answer = fault
    answer = stand.client.post("/predict", content=IMAGE)
    assert_problem(answer, 500, "internal_error")
    assert "secret" not in answer.text
