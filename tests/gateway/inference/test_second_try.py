"""A call that a replica refused before any work began is sent to another one, once; no other call is sent twice."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, FakeTorchServe, Stand

IMAGE = b"image-of-dog"
ROUTES = ["/predict", "/explain", "/predict/batch", "/v2/models/cifar10/infer"]
NO_WORKER = b'{"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}'


def refuse_connection(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


def refuse_for_want_of_room(_request: httpx.Request) -> httpx.Response:
    return httpx.Response(503, content=NO_WORKER)


def not_loaded(_request: httpx.Request) -> httpx.Response:
    return httpx.Response(404, json={"type": "ModelVersionNotFoundException"})


@pytest.fixture
def make_pair(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent]
) -> Callable[..., tuple[Stand, dict[str, int]]]:
    """Return `make_pair(first, second)`: a gateway with two replicas that answer so, and the calls that each got."""

    def make(first: Any, second: Any, **settings: Any) -> tuple[Stand, dict[str, int]]:
        answers = {"first": first, "second": second}
        agents = {name: make_agent(inference_url=f"http://{name}:8080") for name in answers}
        calls = dict.fromkeys(answers, 0)

        async def upstream(request: httpx.Request) -> httpx.Response:
            calls[request.url.host] += 1
            await asyncio.sleep(0.005)
            answer: httpx.Response = answers[request.url.host](request)
            return answer

        stand = make_stand(
            agent=lambda request: agents[request.url.host](request),
            agents=("http://first", "http://second"),
            upstream=upstream,
            chance=lambda: 0.0,  # of two equal replicas the first is chosen
            **settings,
        )
        return stand, calls

    return make


def ask(stand: Stand, route: str) -> httpx.Response:
    return stand.client.post(route, **stand.body(route, IMAGE))


@pytest.mark.parametrize("refuse", [refuse_connection, refuse_for_want_of_room, not_loaded])
@pytest.mark.parametrize("route", ROUTES)
def test_a_call_that_one_replica_did_not_begin_is_answered_by_the_other(
    make_pair: Callable[..., Any], make_torchserve: type[FakeTorchServe], route: str, refuse: Any
) -> None:
    stand, calls = make_pair(refuse, make_torchserve(), poll_s=30)  # no later status brings it back
    assert [ask(stand, route).status_code for _ in range(3)] == [200] * 3
    assert calls == {"first": 1, "second": 3}, "the one that refused is set aside"


@pytest.mark.parametrize("route", ROUTES)
def test_a_call_that_both_refuse_has_two_tries(make_pair: Callable[..., Any], route: str) -> None:
    stand, calls = make_pair(refuse_connection, refuse_connection)
    answer = ask(stand, route)
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "not_ready", "1")
    assert calls == {"first": 1, "second": 1}


def lose_connection(_request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("gone")


def lose_worker(_request: httpx.Request) -> httpx.Response:
    return httpx.Response(503, json={"type": "InternalServerException", "message": "Worker died."})


@pytest.mark.parametrize(("fail", "code"), [(lose_connection, "engine_broke"), (lose_worker, "handler_failed")])
@pytest.mark.parametrize("route", ["/predict", "/explain"])
def test_a_call_on_which_work_may_have_begun_is_not_sent_again(
    make_pair: Callable[..., Any], make_torchserve: type[FakeTorchServe], route: str, fail: Any, code: str
) -> None:
    stand, calls = make_pair(fail, make_torchserve())
    assert ask(stand, route).json()["code"] == code
    assert calls == {"first": 1, "second": 0}


def test_images_sent_together_are_answered_together_by_the_other_replica(
    make_pair: Callable[..., Any], make_torchserve: type[FakeTorchServe]
) -> None:
    stand, calls = make_pair(refuse_for_want_of_room, make_torchserve())

    async def together() -> list[httpx.Response]:
        names = [b"image-of-dog", b"image-of-cat", b"image-of-frog"] * 5
        return await asyncio.gather(*(stand.client.http.post("/predict", content=name) for name in names))

    answers = stand.client.portal.call(together)
    assert [answer.json()["class"] for answer in answers] == ["dog", "cat", "frog"] * 5
    assert calls["second"] < 15
