"""The addresses behind a Service: its EndpointSlices, followed by watch."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.inference.discovery import Address, Discovery
from gateway.inference.replicas import Agents
from gateway.kubernetes import watch
from gateway.kubernetes.addresses import ServiceAddress
from gateway.kubernetes.endpoints import WatchedEndpoints, urls_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import FakeKubernetes

ADDRESS = "kubernetes:default/agents:9100"


def slice_of(name: str, *hosts: str, family: str = "IPv4", service: str = "agents") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": [{"addresses": [host], "conditions": {"ready": False}} for host in hosts],
    }


@pytest.fixture
def endpoints(cluster: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedEndpoints]:
    monkeypatch.setattr(watch, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(watch, "BACKOFF_MOST_S", 0.05)
    found = WatchedEndpoints(cluster.api(), ServiceAddress("default", "agents", 9100))
    yield found
    found.close()
    cluster.end_watches()
    if found._thread is not None:
        found._thread.join(5)
        assert not found._thread.is_alive()


def hosts(endpoints: WatchedEndpoints) -> list[str]:
    endpoints.start()
    endpoints.wait(5)
    return [httpx.URL(url).host for url in endpoints.urls()]


def wait_for(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_endpoints_of_all_slices_of_the_service_are_found_whether_ready_or_not(
    cluster: FakeKubernetes, endpoints: WatchedEndpoints
) -> None:
    cluster.put(slice_of("agents-1", "10.0.0.1", "10.0.0.2"))
    cluster.put(slice_of("agents-2", "10.0.0.3"))
    cluster.put(slice_of("others-1", "10.0.0.4", service="others"))
    assert hosts(endpoints) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def test_pods_that_come_and_go_are_followed(cluster: FakeKubernetes, endpoints: WatchedEndpoints) -> None:
    assert hosts(endpoints) == []
    cluster.put(slice_of("agents-1", "10.0.0.1"))
    wait_for(lambda: endpoints.has_changed)
    assert hosts(endpoints) == ["10.0.0.1"]
    assert not endpoints.has_changed
    cluster.put(slice_of("agents-1", "10.0.0.2"))
    wait_for(lambda: hosts(endpoints) == ["10.0.0.2"])
    cluster.put(slice_of("agents-2", "10.0.0.3"))
    wait_for(lambda: hosts(endpoints) == ["10.0.0.2", "10.0.0.3"])
    cluster.delete("agents-1")
    wait_for(lambda: hosts(endpoints) == ["10.0.0.3"])
    assert cluster.calls.count(("GET", "")) == 1, "all else came by watch"


@pytest.mark.parametrize("failure", [403, 409, 503, httpx.ConnectError("refused")])
def test_the_last_addresses_stay_while_the_server_is_away(
    cluster: FakeKubernetes,
    endpoints: WatchedEndpoints,
    failure: int | Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.put(slice_of("agents-1", "10.0.0.1"))
    assert hosts(endpoints) == ["10.0.0.1"]
    cluster.fail = failure
    cluster.end_watches()
    wait_for(lambda: f"{ADDRESS} cannot be followed" in caplog.text)
    assert hosts(endpoints) == ["10.0.0.1"]
    cluster.put(slice_of("agents-1", "10.0.0.2"))
    cluster.fail = None
    wait_for(lambda: hosts(endpoints) == ["10.0.0.2"])


def test_a_version_that_is_too_old_is_listed_again_and_what_was_deleted_meanwhile_is_gone(
    cluster: FakeKubernetes, endpoints: WatchedEndpoints
) -> None:
    cluster.put(slice_of("agents-1", "10.0.0.1"))
    cluster.put(slice_of("agents-2", "10.0.0.2"))
    assert len(hosts(endpoints)) == 2
    wait_for(lambda: ("WATCH", "") in cluster.calls)
    with cluster.changed:
        cluster.oldest = cluster.version + 1
        del cluster.objects["agents-1"]
    cluster.end_watches()
    wait_for(lambda: hosts(endpoints) == ["10.0.0.2"])


def test_a_pod_with_both_families_counts_once_and_ipv6_has_brackets() -> None:
    both = {"a": slice_of("a", "10.0.0.1"), "b": slice_of("b", "fd00::1", family="IPv6")}
    assert urls_of(both, 9100) == ("http://10.0.0.1:9100",)
    del both["a"]
    assert urls_of(both, 9100) == ("http://[fd00::1]:9100",)
    assert urls_of({"c": slice_of("c", "host.example", family="FQDN")}, 9100) == ()
    assert urls_of({"d": {**slice_of("d"), "endpoints": None}}, 9100) == ()


def test_a_gateway_polls_the_agents_that_the_watch_brings_without_waiting_for_the_next_look_at_names(
    cluster: FakeKubernetes, endpoints: WatchedEndpoints
) -> None:
    cluster.put(slice_of("agents-1", "10.0.0.1"))
    asked: set[str] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.add(request.url.host)
        return httpx.Response(500)

    async def scene() -> tuple[Address, ...]:
        discovery = Discovery((ADDRESS,), watch=lambda _: endpoints)
        agents = Agents(discovery, max_age_s=3, transport=httpx.MockTransport(answer), clock=lambda: 7.0)
        await agents.poll_all(1)
        assert asked == {"10.0.0.1"}
        cluster.put(slice_of("agents-2", "10.0.0.2"))
        await asyncio.to_thread(wait_for, lambda: endpoints.has_changed)
        agents.begin_polls(1)
        async with asyncio.timeout(5):
            while len(agents.replicas) < 2:  # noqa: ASYNC110 — the task that finds them belongs to the agents
                await asyncio.sleep(0.005)
        agents.begin_polls(1)
        async with asyncio.timeout(5):
            while len(asked) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await agents.close()
        return discovery.listed()

    assert asyncio.run(scene()) == (Address("http://10.0.0.1:9100"), Address("http://10.0.0.2:9100"))
