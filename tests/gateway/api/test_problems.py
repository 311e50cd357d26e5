"""Every exception becomes one problem document, and an unexpected one tells nothing of itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from starlette.exceptions import HTTPException

from gateway.api.problems import from_exception, problem_response, raw_problem
from gateway.refusals import HeadersTooLarge, ModelUnknown

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


def test_a_problem_for_v2_has_the_member_that_its_clients_read() -> None:
    error = ModelUnknown("other")
    plain, for_v2 = (json.loads(problem_response(error, "r1", path).body) for path in ("/predict", "/v2/models/other"))
    assert for_v2 == {**plain, "error": error.detail}


def test_a_problem_in_bytes_is_a_whole_http_response() -> None:
    error = HeadersTooLarge(16_384, 100)
    head, _, body = raw_problem(error, "r1", [(b"server", b"gradserve")]).partition(b"\r\n\r\n")
    line, *headers = head.decode("ascii").split("\r\n")
    assert line == "HTTP/1.1 431 Request Header Fields Too Large"
    assert dict(header.split(": ") for header in headers) == {
        "content-type": "application/problem+json",
        "content-length": str(len(body)),
        "x-request-id": "r1",
        "connection": "close",
        "server": "gradserve",
    }
    assert json.loads(body) == {**error.problem(), "request_id": "r1"}


@pytest.mark.parametrize("exception", [ValueError("/srv/secret"), HTTPException(418, "secret"), KeyError("secret")])
def test_what_nobody_expected_is_an_internal_error_without_its_message(exception: Exception) -> None:
    error = from_exception(exception)
    assert (error.status, error.code) == (500, "internal_error")
    assert "secret" not in error.detail
