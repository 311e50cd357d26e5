"""Each model has its own places and turns: the overload of one model takes none from another."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import FakeAgent, FakeTorchServe, Stand

    Blocked = tuple[Stand, asyncio.Event]

FILE = {"file": b"image-of-cat"}


@pytest.fixture
def make_blocked(
    make_two_models: Callable[..., Stand], make_torchserve: type[FakeTorchServe]
) -> Callable[..., Blocked]:
    """Return `make_blocked(setting=…)`: a gateway whose model cifar10 answers nothing until the event is set."""
    finish, torchserve = asyncio.Event(), make_torchserve()

    async def upstream(request: httpx.Request) -> httpx.Response:
        if "/cifar10" in request.url.path:
            await finish.wait()
        return torchserve(request)

    return lambda **settings: (make_two_models(upstream=upstream, admission_wait_s=0.01, **settings), finish)


async def flood(stand: Stand, finish: asyncio.Event, route: str, wanted: list[str]) -> tuple[list[int], list[int], str]:
    """Send calls to cifar10, then one to each path of `wanted`; return both statuses, and the metrics meanwhile."""
    calls = [asyncio.ensure_future(stand.client.http.post(route, files=FILE)) for _ in range(8)]
    for refused in itertools.islice(asyncio.as_completed(calls, timeout=20), 6):  # two have a place
        await refused
    answers = [await stand.client.http.post(path, files=FILE) for path in wanted]
    metrics = (await stand.client.http.get("/metrics")).text
    finish.set()
    return [(await call).status_code for call in calls], [answer.status_code for answer in answers], metrics


@pytest.mark.parametrize("route", ["/predict", "/explain", "/predict/batch"])
def test_a_model_answers_while_another_one_is_saturated(make_blocked: Callable[..., Blocked], route: str) -> None:
    stand, finish = make_blocked(in_flight_predict=2, in_flight_explain=2, in_flight_backward=2, timeout_s=5.0)
    wanted = [route, f"{route}?model=photos"]
    flooding, answers, metrics = stand.client.portal.call(flood, stand, finish, route, wanted)
    assert sorted(set(flooding)) == [200, 503]
    assert answers == [503, 200], "cifar10 is still full"
    kind = "backward" if route == "/explain" else "predict"
    lines = metrics.splitlines()
    assert f'gateway_in_flight{{kind="{kind}",model="cifar10"}} 2.0' in lines
    assert f'gateway_in_flight{{kind="{kind}",model="photos"}}' in metrics
    refused = f'gateway_refused_total{{code="saturated",model="cifar10"}} {flooding.count(503) + 1}.0'
    assert [line for line in lines if line.startswith("gateway_refused_total{")] == [refused]


def test_a_batch_does_not_wait_for_the_turns_of_another_models_batches(make_blocked: Callable[..., Blocked]) -> None:
    stand, finish = make_blocked(chunk_images=1, in_flight_predict=50)

    async def scene() -> list[int]:
        many = [("file", ("x", b"image-of-cat"))] * 20
        held = [asyncio.ensure_future(stand.client.http.post("/predict/batch", files=many)) for _ in range(3)]
        await asyncio.sleep(0.1)
        other = await stand.client.http.post(
            "/predict/batch?model=photos", files=many, headers={"x-timeout-ms": "3000"}
        )
        finish.set()
        return [other.status_code, *[(await call).status_code for call in held]]

    assert stand.client.portal.call(scene) == [200] * 4


def test_places_follow_from_the_models_own_workers_and_a_removed_model_has_none(
    make_two_models: Callable[..., Stand], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    six = {"ready": 6, "wanted": 6, "pending": 0, "capacity": 100}
    stand = make_two_models(agent=make_agent([make_version(), make_version(model="photos", predict=six)]))

    def places() -> dict[str, int]:
        limiters = stand.app.state.gateway.admission.limiters()
        return {model: limiter.limit for model, kind, limiter in limiters if kind == "predict"}

    # Two upstream batches of 32 images for each worker, and a quarter more for all callers together.
    stand.wait_until(lambda: places() == {"cifar10": 160, "photos": 480})
    plan = json.loads(stand.plan.read_text(encoding="utf-8"))
    stand.plan.write_text(json.dumps({**plan, "revision": 2, "models": plan["models"][:1]}), encoding="utf-8")
    stand.wait_until(lambda: places() == {"cifar10": 160, "photos": 0})
