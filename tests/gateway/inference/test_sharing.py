"""Several replicas share one batch, and several gateways share the workers by what the agents tell of each other."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import FakeAgent, FakeTorchServe, Stand

HOSTS = ("first", "second", "third")


@pytest.fixture
def make_three(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_torchserve: type[FakeTorchServe]
) -> Callable[..., tuple[Stand, dict[str, FakeAgent], Counter[str]]]:
    """Return `make_three(…)`: a gateway with three replicas of two workers, their agents, its calls by host."""

    def make(**settings: Any) -> tuple[Stand, dict[str, FakeAgent], Counter[str]]:
        agents = {host: make_agent(inference_url=f"http://{host}:8080") for host in HOSTS}
        torchserve, calls = make_torchserve(), Counter[str]()

        async def upstream(request: httpx.Request) -> httpx.Response:
            calls[request.url.host] += 1
            await asyncio.sleep(0.05)
            return torchserve(request)

        stand = make_stand(
            agent=lambda request: agents[request.url.host](request),
            agents=tuple(f"http://{host}" for host in HOSTS),
            upstream=upstream,
            chance=lambda: 0.0,  # of equal replicas the first is chosen
            **settings,
        )
        return stand, agents, calls

    return make


def post_batch(stand: Stand, count: int) -> httpx.Response:
    return stand.client.post("/predict/batch", files=[("file", ("x", b"image-of-cat"))] * count)


def test_a_batch_is_spread_evenly_over_all_workers_of_all_replicas(make_three: Callable[..., Any]) -> None:
    stand, _, calls = make_three()
    answer = post_batch(stand, 60)
    assert [entry["class"] for entry in answer.json()["results"]] == ["cat"] * 60
    assert calls == {"first": 2, "second": 2, "third": 2}, "an upstream batch of ten images for each of six workers"


def test_a_long_batch_keeps_every_replica_busy_until_its_end(make_three: Callable[..., Any]) -> None:
    stand, _, calls = make_three(chunk_images=2)
    assert post_batch(stand, 120).status_code == 200
    assert calls.total() == 60
    assert all(abs(count - 20) <= 2 for count in calls.values()), calls


def test_a_batch_explained_by_a_backward_pass_is_spread_too(make_three: Callable[..., Any]) -> None:
    stand, _, calls = make_three()
    files = [("file", ("x", b"image-of-cat"))] * 6
    assert stand.client.post("/explain/batch", files=files).status_code == 200
    assert calls == {"first": 2, "second": 2, "third": 2}


def test_a_batch_ends_on_the_version_that_it_began_with_though_no_replica_takes_new_calls(
    make_three: Callable[..., Any],
) -> None:
    stand, agents, calls = make_three(chunk_images=1)

    async def scene() -> tuple[list[dict[str, Any]], int]:
        files = [("file", ("x", b"image-of-cat"))] * 48
        call = asyncio.ensure_future(stand.client.http.post("/predict/batch", files=files))
        while not calls:  # noqa: ASYNC110 — another thread's event loop counts
            await asyncio.sleep(0.001)
        heard = 0
        for agent in agents.values():
            agent.versions = [{**version, "routable": False} for version in agent.versions]
        while any(target for target in stand.app.state.gateway.router.stable_workers().values() if target.ready > 1):
            await asyncio.sleep(0.001)
            heard = max(heard, *(agent.heard["in_flight"].get("cifar10/1.0.0", 0) for agent in agents.values()))
        return (await call).json()["results"], heard

    results, heard = stand.client.portal.call(scene)
    assert [entry.get("class") for entry in results] == ["cat"] * 48
    assert heard, "the agents are told that the version is needed"


def places(stand: Stand) -> int:
    limit: int = stand.app.state.gateway.admission.of("cifar10").predict.limit
    return limit


def test_gateways_share_places_and_turns_by_the_calls_that_each_has_in_flight(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    six = {"ready": 6, "wanted": 6, "pending": 0, "capacity": 100}
    agent = make_agent([make_version(predict=six)])
    stand = make_stand(agent=agent)
    stand.wait_until(lambda: places(stand) == 480)  # two upstream batches for each of six workers, and a quarter more
    busy, idle = {"cifar10/1.0.0": 3}, {"cifar10/1.0.0": 0, "other/1.0.0": 7}
    for others, share in (([busy, idle], 3), ([busy, busy], 2), ([{"1.0.0": 1}, idle], 3), ([idle], 6)):
        agent.others = others
        stand.wait_until(lambda share=share: places(stand) == 80 * share)  # type: ignore[misc]
        target = stand.app.state.gateway.router.choose("predict", None)
        assert stand.app.state.gateway.service._most_in_flight(target, 2) == 2 * share


@pytest.mark.parametrize(("others", "most_wanted"), [([], 4), ([{"cifar10/1.0.0": 1}], 2)])
def test_gateways_together_have_an_upstream_batch_in_flight_for_each_worker(
    make_stand: Callable[..., Stand],
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    make_torchserve: type[FakeTorchServe],
    others: list[dict[str, int]],
    most_wanted: int,
) -> None:
    now = most = 0
    torchserve = make_torchserve()

    async def upstream(request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return torchserve(request)

    four = {"ready": 4, "wanted": 4, "pending": 0, "capacity": 100}
    agent = make_agent([make_version(predict=four)])
    agent.others = others
    stand = make_stand(agent=agent, upstream=upstream, chunk_images=2, in_flight_predict=100)

    async def crowd() -> set[int]:
        calls = (stand.client.http.post("/predict", content=b"image-of-cat") for _ in range(40))
        return {answer.status_code for answer in await asyncio.gather(*calls)}

    assert stand.client.portal.call(crowd) == {200}
    assert most == most_wanted
