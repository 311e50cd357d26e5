"""The list of replicas: host names with several addresses, and replicas that come and go."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from gateway.inference.discovery import Address, Discovery, resolve_host

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand


class Names:
    """A name server: `hosts` are the addresses of every name; None lets it fail."""

    def __init__(self, *hosts: str) -> None:
        self.hosts: list[str] | None = list(hosts)

    async def __call__(self, _host: str, _port: int) -> list[str]:
        if self.hosts is None:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return self.hosts


def test_a_name_stands_for_each_of_its_addresses_and_an_address_for_itself() -> None:
    discovery = Discovery(("http://agents:9100", "http://10.0.0.9:9100"), resolve=Names("10.0.0.1", "fd00::2"))
    assert asyncio.run(discovery.find()) == (
        Address("http://10.0.0.1:9100", "agents"),
        Address("http://[fd00::2]:9100", "agents"),
        Address("http://10.0.0.9:9100"),
    )


def test_a_name_that_cannot_be_resolved_keeps_its_last_addresses(caplog: pytest.LogCaptureFixture) -> None:
    names = Names("10.0.0.1")
    discovery = Discovery(("http://agents:9100",), resolve=names)
    found = asyncio.run(discovery.find())
    names.hosts = None
    assert asyncio.run(discovery.find()) == found != ()
    assert "agents cannot be resolved" in caplog.text


def test_two_names_of_one_replica_are_one_replica() -> None:
    discovery = Discovery(("http://a:9100", "http://b:9100"), resolve=Names("10.0.0.1"))
    assert len(asyncio.run(discovery.find())) == 1


@pytest.mark.parametrize("url", ["http://localhost:9100", "https://agents:9100"])
def test_localhost_and_names_of_certificates_are_not_resolved(url: str) -> None:
    assert asyncio.run(Discovery((url,), resolve=Names("10.0.0.1")).find()) == (Address(url),)


def test_a_machine_with_both_families_counts_once() -> None:
    assert asyncio.run(resolve_host("localhost", 80)) == ["127.0.0.1"]


def test_a_new_replica_gets_calls_and_one_that_left_gets_none(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent]
) -> None:
    agents = {host: make_agent(inference_url=f"http://{host}:8080") for host in ("10.0.0.1", "10.0.0.2")}
    names = Names("10.0.0.1")
    stand = make_stand(
        agent=lambda request: agents[request.url.host](request), agents=("http://agents",), resolve=names
    )

    def asked(count: int = 20) -> set[str]:
        stand.torchserve.calls.clear()
        assert {stand.client.post("/predict", content=b"x").status_code for _ in range(count)} == {200}
        return {call.url.host for call in stand.torchserve.calls}

    def replicas() -> dict[str, Any]:
        report: dict[str, Any] = stand.client.get("/health").json()["replicas"]
        return report

    assert asked() == {"10.0.0.1"}
    names.hosts = ["10.0.0.1", "10.0.0.2"]
    stand.wait_until(lambda: replicas() == {"known": 2, "seen": 2})
    assert asked(40) == set(agents)
    names.hosts = ["10.0.0.2"]
    stand.wait_until(lambda: replicas() == {"known": 1, "seen": 1})
    assert asked() == {"10.0.0.2"}


def test_a_replica_that_left_is_polled_until_its_last_call_is_answered(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent]
) -> None:
    agents = {host: make_agent(inference_url=f"http://{host}:8080") for host in ("10.0.0.1", "10.0.0.2")}
    names = Names("10.0.0.1")
    finish = asyncio.Event()

    async def slow(request: Any) -> Any:
        if request.url.host == "10.0.0.1":
            await finish.wait()
        return stand.torchserve(request)

    stand = make_stand(
        agent=lambda request: agents[request.url.host](request),
        agents=("http://agents",),
        resolve=names,
        upstream=slow,
    )
    call = stand.client.portal.start_task_soon(lambda: stand.client.http.post("/predict", content=b"x"))
    stand.wait_until(lambda: agents["10.0.0.1"].heard["in_flight"] == {"cifar10/1.0.0": 1})
    names.hosts = ["10.0.0.2"]
    stand.wait_until(lambda: stand.client.get("/health").json()["replicas"] == {"known": 1, "seen": 1})
    agents["10.0.0.1"].heard = {}
    stand.wait_until(lambda: agents["10.0.0.1"].heard.get("in_flight") == {"cifar10/1.0.0": 1})
    stand.client.portal.call(finish.set)
    assert call.result(20).status_code == 200
    stand.wait_until(lambda: agents["10.0.0.1"].heard.get("in_flight") == {"cifar10/1.0.0": 1} and forgotten(stand))


def forgotten(stand: Stand) -> bool:
    """Return True if the gateway polls one replica only."""
    return len(stand.app.state.gateway.agents._replicas) == 1


def test_agents_that_report_their_common_name_each_get_their_own_calls(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent]
) -> None:
    agent = make_agent(inference_url="http://agents:8080")
    stand = make_stand(agent=agent, agents=("http://agents",), resolve=Names("10.0.0.1", "10.0.0.2"))
    for _ in range(40):
        stand.client.post("/predict", content=b"x")
    assert {call.url.host for call in stand.torchserve.calls} == {"10.0.0.1", "10.0.0.2"}
