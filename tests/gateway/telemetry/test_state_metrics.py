"""Gauges of the current state: replicas, workers, queues, places, plan and disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from gateway.telemetry.state_metrics import state_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import FakeAgent, Stand


def test_metrics_have_replicas_workers_queues_places_plan_and_disks(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    queued = {"ready": 2, "wanted": 2, "pending": 7, "capacity": 100}
    works = make_agent(versions=[make_version(predict=queued), make_version("2.0.0", "canary", routable=False)])

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "gone":
            raise httpx.ConnectError("refused")
        return works(request)

    stand = make_stand(agent=answer, agents=("http://works", "http://gone"), in_flight_predict=5)
    stand.plan.write_text("{", encoding="utf-8")
    stand.wait_until(lambda: stand.app.state.gateway.router.plan_error is not None)
    lines = set(stand.client.get("/metrics").text.splitlines())
    assert {
        "gateway_replicas_wanted 2.0",
        "gateway_replicas_seen 1.0",
        "gateway_stable_ready 1.0",
        "gateway_plan_broken 1.0",
        "gateway_plan_revision 1.0",
        'gateway_workers_ready{kind="predict",model="cifar10",role="stable",version="1.0.0"} 2.0',
        'gateway_workers_ready{kind="predict",model="cifar10",role="canary",version="2.0.0"} 0.0',
        'gateway_workers_wanted{kind="predict",model="cifar10",role="canary",version="2.0.0"} 2.0',
        'gateway_queue_depth{kind="predict",model="cifar10",role="stable",version="1.0.0"} 7.0',
        'gateway_queue_capacity{kind="predict",model="cifar10",role="stable",version="1.0.0"} 100.0',
        'gateway_capacity{kind="predict",model="cifar10"} 7.0',
        'gateway_waiting{kind="predict",model="cifar10"} 0.0',
    } <= lines
    free, size = (stand.metric(f"gateway_disk_{name}_bytes", folder="plan") for name in ("free", "size"))
    assert 0 < free < size


def test_workers_of_a_version_that_is_not_verified_are_wanted_and_not_ready(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    stand = make_stand(agent=make_agent(versions=[make_version(), make_version("2.0.0", "canary", routable=False)]))
    told = {family.name: family.samples for family in state_metrics(stand.app.state.gateway)}

    def workers(name: str, version: str) -> list[float]:
        return [sample.value for sample in told[name] if sample.labels["version"] == version]

    assert workers("gateway_workers_ready", "1.0.0") == workers("gateway_workers_wanted", "1.0.0") == [2.0, 1.0]
    assert (workers("gateway_workers_ready", "2.0.0"), workers("gateway_workers_wanted", "2.0.0")) == ([0, 0], [2, 1])


def test_a_disk_that_is_gone_is_left_out(stand: Stand, tmp_path: Path) -> None:
    state = stand.app.state.gateway
    state.settings = state.settings.model_copy(update={"plan": tmp_path / "gone" / "plan.json"})
    told = {family.name: family.samples for family in state_metrics(state)}
    assert told["gateway_disk_free_bytes"] == told["gateway_disk_size_bytes"] == []
