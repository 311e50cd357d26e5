"""The outermost layer: calls without a place are refused early, bodies are bounded, and answers have their times."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import Stand

IMAGE = b"image-of-dog"


def test_a_call_beyond_places_and_queue_is_refused_before_its_body_is_looked_at(
    make_stand: Callable[..., Stand],
) -> None:
    finish = asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await finish.wait()
        return stand.torchserve(request)

    keys = tuple(f"{name}:{sha256(name.encode()).hexdigest()}:predict" for name in ("burst", "other"))
    stand = make_stand(upstream=slow, keys=keys, in_flight_predict=1, admission_wait_s=5)
    text = {"content-type": "text/plain"}

    async def scene() -> list[int]:
        burst = [
            asyncio.create_task(stand.client.http.post("/predict", content=b"x", headers={"x-api-key": "burst"}))
            for _ in range(2)
        ]
        await asyncio.sleep(0.05)
        late = [
            await stand.client.http.post("/predict", content=b"x", headers={"x-api-key": name, **text})
            for name in ("burst", "other")
        ]
        finish.set()
        return [answer.status_code for answer in (*await asyncio.gather(*burst), *late)]

    assert stand.client.portal.call(scene) == [200, 200, 503, 415], "the other caller has room"


def test_bodies_held_at_a_time_are_bounded_and_counted_back(make_stand: Callable[..., Stand]) -> None:
    stand = make_stand(max_buffered_bytes=1000)
    budget = stand.app.state.gateway.body_budget
    refused = stand.client.post("/predict", content=b"x" * 1001)
    assert (refused.status_code, refused.json()["code"]) == (503, "saturated")
    for _ in range(3):
        assert stand.client.post("/predict", content=b"x" * 900).status_code == 200
    assert budget.held == 0


def test_a_caller_who_does_not_read_the_answer_holds_no_body(stand: Stand) -> None:
    budget = stand.app.state.gateway.body_budget
    held: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 900}

    async def send(message: dict[str, Any]) -> None:
        held.append(budget.held)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
    }
    stand.client.portal.call(stand.app, scope, receive, send)
    assert held == [0, 0]


def test_answers_have_the_times_of_their_stages(stand: Stand) -> None:
    timing = stand.client.post("/predict", content=IMAGE).headers["server-timing"]
    assert [part.split(";")[0] for part in timing.split(", ")] == ["body", "wait", "model", "total"]
