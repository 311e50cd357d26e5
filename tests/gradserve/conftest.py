"""Fixtures: both clients in front of a fake gateway, which is a function from request to response."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gradserve import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable

    Gateway = Callable[[httpx.Request], httpx.Response]
    Ask = Callable[..., Any]


def sync_ask(gateway: Gateway, pauses: list[float], **options: Any) -> Ask:
    def ask(method: str, *arguments: Any, **named: Any) -> Any:
        transport = httpx.MockTransport(gateway)
        with Client("http://gateway", transport=transport, sleep=pauses.append, **options) as client:
            return getattr(client, method)(*arguments, **named)

    return ask


def async_ask(gateway: Gateway, pauses: list[float], **options: Any) -> Ask:
    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def answer(method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        transport = httpx.MockTransport(gateway)
        async with AsyncClient("http://gateway", transport=transport, sleep=sleep, **options) as client:
            return await getattr(client, method)(*arguments, **named)

    return lambda method, *arguments, **named: asyncio.run(answer(method, arguments, named))


@pytest.fixture(params=[sync_ask, async_ask], ids=["sync", "async"])
def asking(request: pytest.FixtureRequest) -> Callable[..., Ask]:
    """Return `asking(gateway, pauses, …)`, which returns `ask(method, …)`, for the client and for the async client."""
    return lambda gateway, pauses=None, **options: request.param(gateway, [] if pauses is None else pauses, **options)


def evidence_document(**changes: Any) -> dict[str, Any]:
    """Return the document of /explain."""
    url = "/models/cifar10/versions/1.0.0/examples/7.png"
    return {
        "class": "cat",
        "confidence": 0.9,
        "target": {"class": "dog", "confidence": 0.05},
        "method": "contrastcam",
        "heatmap": {"height": 2, "width": 3, "values": base64.b64encode(bytes([0, 51, 102, 153, 204, 255])).decode()},
        "strength": 3.5,
        "familiar": True,
        "familiarity": 0.8,
        "similar": [{"id": 7, "class": "cat", "similarity": 0.93, "image": url}],
        "classes": [{"class": "cat", "confidence": 0.9}, {"class": "dog", "confidence": 0.05}],
        "test": {"kept": 0.4, "removed": 0.01, "verdict": "The hot region decides."},
        "model": {"name": "cifar10", "version": "1.0.0"},
        "request_id": "r1",
        **changes,
    }


@pytest.fixture
def document() -> Callable[..., dict[str, Any]]:
    """Return `document(**changes)`, which returns the document of /explain."""
    return evidence_document
