"""The Python client against the real application."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from gradserve import Client, GatewayProblem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Stand


@pytest.fixture
def gateway(stand: Stand) -> Client:
    def forward(request: httpx.Request) -> httpx.Response:
        answer = stand.client.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return Client("http://gateway", transport=httpx.MockTransport(forward))


def test_the_client_reaches_every_route(gateway: Client, tmp_path: Path) -> None:
    image = tmp_path / "dog.png"
    image.write_bytes(b"image-of-dog")
    with gateway:
        assert gateway.predict(image, top_k=2)["class"] == "dog"
        entries = gateway.predict_batch([image, b"bad:image_unreadable"])
        assert (entries[0]["class"], entries[1]["error"]["status"]) == ("dog", 422)
        assert gateway.explain(b"x", target="frog", alpha=0.3).startswith(b"\x89PNG")
        assert gateway.heatmap(b"x")["layer"] == "layer3"
        assert gateway.health()["status"] == "ok"
        assert gateway.models()["name"] == "cifar10"


def test_a_refusal_carries_its_problem(gateway: Client) -> None:
    with pytest.raises(GatewayProblem, match="404 version_unknown") as refusal:
        gateway.predict(b"x", version="9.9.9")
    assert refusal.value.problem["version"] == "9.9.9"


def refusing(times: int, status: int) -> tuple[Callable[[httpx.Request], httpx.Response], list[httpx.Request]]:
    calls: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) <= times:
            return httpx.Response(status, json={"code": "saturated"}, headers={"retry-after": "3"})
        return httpx.Response(200, json={"class": "cat"})

    return answer, calls


def test_a_refused_call_is_sent_again_after_retry_after() -> None:
    answer, calls = refusing(2, 503)
    pauses: list[float] = []
    gateway = Client("http://g", transport=httpx.MockTransport(answer), sleep=pauses.append)
    assert gateway.predict(b"x") == {"class": "cat"}
    assert len(calls) == 3
    assert all(3 <= pause <= 4.5 for pause in pauses)


@pytest.mark.parametrize("status", [400, 500, 502, 504])
def test_a_call_on_which_work_may_have_begun_is_not_sent_again_by_the_client(status: int) -> None:
    answer, calls = refusing(1, status)
    with pytest.raises(GatewayProblem):
        Client("http://g", transport=httpx.MockTransport(answer), sleep=lambda _: None).predict(b"x")
    assert len(calls) == 1


def test_the_client_does_not_wait_for_a_daily_quota() -> None:
    calls = []

    def refuse(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(429, headers={"retry-after": "86000"}, json={"code": "quota_exceeded"})

    with pytest.raises(GatewayProblem, match="429 quota_exceeded"):
        Client("http://g", transport=httpx.MockTransport(refuse), sleep=lambda _: pytest.fail("slept")).predict(b"x")
    assert len(calls) == 1


def test_an_html_page_of_a_proxy_raises_a_gateway_problem() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(502, text="<html>"))
    with pytest.raises(GatewayProblem, match="502 unknown"):
        Client("http://g", transport=transport).predict(b"x")


def test_the_key_is_sent(stand: Stand) -> None:
    seen: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={})

    Client("http://g", key="secret", transport=httpx.MockTransport(note)).models()
    assert seen == ["Bearer secret"]


def test_the_former_import_path_still_works_and_names_the_new_one() -> None:
    sys.modules.pop("gateway.client", None)
    with pytest.warns(DeprecationWarning, match="from gradserve import Client"):
        former = importlib.import_module("gateway.client")
    assert former.Gateway is Client
