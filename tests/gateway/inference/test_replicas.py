"""The statuses that a gateway gets from the agents, and the reports that it sends with every poll."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts.status import MAX_BYTES
from gateway.inference import replicas
from gateway.inference.replicas import Agents

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

    from gateway.inference.discovery import Discovery


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"no json", b'{"torchserve":null}', b"[" * 100_000, b" " * (MAX_BYTES + 1)]
)
def test_an_answer_that_cannot_be_parsed_is_no_status(body: bytes, listed: Callable[..., Discovery]) -> None:
    agents = Agents(
        listed("http://a"), max_age_s=3, transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body))
    )
    asyncio.run(agents.poll_all(None))
    assert agents.current() == []


def test_an_answer_that_is_no_status_is_logged_once(
    caplog: pytest.LogCaptureFixture, listed: Callable[..., Discovery]
) -> None:
    answer = httpx.MockTransport(lambda _: httpx.Response(200, content=b'{"schema": 9}'))
    agents = Agents(listed("http://a"), max_age_s=3, transport=answer)
    for _ in range(3):
        asyncio.run(agents.poll_all(None))
    (line,) = caplog.messages
    assert line.startswith("agent http://a gave no status: agent status field schema is 9, expected 1 or 2")


def test_every_poll_names_the_process_and_the_plan_in_force(
    make_stand: Callable[..., Stand], make_plan: Callable[..., dict[str, Any]]
) -> None:
    first, second = make_stand(), make_stand()
    assert first.agent.heard == {"id": first.agent.heard["id"], "revision": 1, "in_flight": {}}
    assert first.agent.heard["id"] != second.agent.heard["id"]
    first.plan.write_text(json.dumps(make_plan(revision=2)), encoding="utf-8")
    first.wait_until(lambda: first.agent.heard["revision"] == 2)
    first.plan.write_text("{", encoding="utf-8")
    first.wait_until(lambda: first.app.state.gateway.router.plan_error is not None)
    first.agent.heard = {}
    first.wait_until(lambda: bool(first.agent.heard))
    assert first.agent.heard["revision"] == 2, "it goes on routing by that one"


def test_a_call_is_reported_from_its_choice_until_its_answer(make_stand: Callable[..., Stand]) -> None:
    finish = asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await finish.wait()
        return stand.torchserve(request)

    # One place: the second call waits for it, and is told of before TorchServe has heard of it.
    stand = make_stand(upstream=slow, in_flight_predict=1, admission_wait_s=10)
    calls = [
        stand.client.portal.start_task_soon(partial(stand.client.http.post, route, content=b"x"))
        for route in ("/predict", "/predict", "/explain")
    ]
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {"cifar10/1.0.0": 3})
    stand.client.portal.call(finish.set)
    assert [call.result(20).status_code for call in calls] == [200] * 3
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {})


def test_a_batch_is_reported_until_its_last_upstream_batch_is_answered(make_stand: Callable[..., Stand]) -> None:
    told = []

    async def note(request: httpx.Request) -> httpx.Response:
        told.append(stand.app.state.gateway.agents.replicas[0].in_flight["cifar10/1.0.0"])
        await asyncio.sleep(0)
        return stand.torchserve(request)

    stand = make_stand(upstream=note, chunk_images=1, in_flight_predict=1)
    stand.client.post("/predict/batch", files=[("file", ("x", b"image-of-cat"))] * 5)
    assert len(told) == 5
    assert all(told)
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {})


def test_an_agent_that_hangs_delays_neither_the_other_agents_nor_the_plan(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_plan: Callable[..., dict[str, Any]]
) -> None:
    healthy, hangs = make_agent(), asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "hangs" and hangs.is_set():
            await asyncio.sleep(60)
        return healthy(request)

    stand = make_stand(agent=answer, agents=("http://works", "http://hangs"))
    hangs.set()
    time.sleep(0.1)
    stand.plan.write_text(json.dumps(make_plan(revision=2)), encoding="utf-8")
    stand.wait_until(lambda: healthy.heard["revision"] == 2)


@pytest.mark.parametrize("ahead_s", [-10.0, 0.0, 10.0])
def test_the_deadline_is_sent_by_the_replicas_clock(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], ahead_s: float
) -> None:
    left: list[float] = []

    def note(request: httpx.Request) -> httpx.Response:
        deadline = json.loads(request.headers["x-gradserve"])["deadline"]
        left.append(deadline / 1000 - (time.time() + ahead_s))
        return stand.torchserve(request)

    stand = make_stand(agent=make_agent(ahead_s=ahead_s), upstream=note, timeout_s=5.0)
    files = [("file", ("x", b"image-of-cat"))] * 2
    for path in ("/predict", "/explain", "/predict/batch"):
        assert stand.client.post(path, files=files[: 1 + path.endswith("batch")]).status_code == 200
    assert len(left) >= 3
    assert all(4.0 < seconds <= 5.1 for seconds in left), left


def test_a_slow_poll_does_not_change_the_estimate_of_a_clock_that_may_agree(
    listed: Callable[..., Discovery],
) -> None:
    async def scene() -> float:
        async def slow(_request: httpx.Request) -> httpx.Response:
            report = {"schema": 1, "time": time.time(), "observed_at": time.time(), "draining": False, "versions": []}
            report["torchserve"] = {"state": "running", "restarts": 0, "inference_url": "http://t"}
            await asyncio.sleep(0.2)
            return httpx.Response(200, json=report)

        agents = Agents(listed("http://a"), max_age_s=3, transport=httpx.MockTransport(slow))
        await agents.poll_all(None)
        assert len(agents.current()) == 1
        return agents.replicas[0].clock_ahead_s

    assert asyncio.run(scene()) == 0.0


def test_a_replica_whose_agent_does_not_answer_is_set_aside_before_its_status_is_too_old(
    make_agent: type[FakeAgent], listed: Callable[..., Discovery]
) -> None:
    agent, now = make_agent(), 100.0
    is_cut_off = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if is_cut_off.is_set():
            await asyncio.sleep(1e6)
        return agent(request)

    async def scene() -> None:
        nonlocal now
        agents = Agents(listed("http://a"), max_age_s=3, transport=httpx.MockTransport(answer), clock=lambda: now)
        await agents.poll_all(1)
        (replica,) = agents.replicas
        is_cut_off.set()
        for passed, is_avoided in ((0.5, False), (0.5, True)):  # the first tick asks, the second has no answer
            now += passed
            agents.begin_polls(1)
            await asyncio.sleep(0)
            assert replica.is_avoided(now) == is_avoided
        assert agents.current(), "its status is not old yet, so it gets calls if there is no other replica"
        is_cut_off.clear()
        assert replica.poll is not None
        replica.poll.cancel()
        await asyncio.sleep(0)
        now += 0.5
        await agents.poll_all(1)
        assert not replica.is_avoided(now)
        await agents.close()

    asyncio.run(scene())


def test_many_replicas_keep_their_connections_between_polls(
    listed: Callable[..., Discovery], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "POLL_TIMEOUT_S", 60)  # 120 agents in one process beside other tests are slow
    connections = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()
        await writer.wait_closed()

    async def poll_three_times() -> None:
        server = await asyncio.start_server(answer, "0.0.0.0", 0, backlog=200)
        port = server.sockets[0].getsockname()[1]
        agents = Agents(listed(*(f"http://127.0.1.{number}:{port}" for number in range(120))), max_age_s=3)
        for _ in range(3):
            await agents.poll_all(None)
        await agents.close()
        await asyncio.gather(*connections)
        server.close()

    asyncio.run(poll_three_times())
    assert len(connections) == 120
