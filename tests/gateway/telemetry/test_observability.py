"""Metrics and logs: bounded labels, times, no image and no key."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.request_context import RequestContext
from gateway.telemetry.logs import JsonFormatter, logging_config
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand


def metric(stand: Stand, name: str, **labels: str) -> float:
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in stand.client.get("/metrics").text.splitlines()
        if line.startswith(f"{name}{{") and all(label in line for label in wanted)
    )


def test_requests_are_counted_by_route_status_and_version(stand: Stand) -> None:
    stand.client.post("/predict", content=b"x")
    stand.client.post("/predict", content=b"")
    stand.client.post("/predict/batch", files=[("file", ("x", b"image-of-dog"))] * 3)
    assert metric(stand, "gateway_requests_total", route="/predict", status="200") == 1
    assert metric(stand, "gateway_requests_total", route="/predict", status="400") == 1
    assert metric(stand, "gateway_refused_total", code="empty_body") == 1
    by_version = {"version": "1.0.0", "kind": "predict"}
    assert metric(stand, "gateway_version_requests_total", **by_version, outcome="ok") == 1
    assert metric(stand, "gateway_model_seconds_count", **by_version) == 1
    assert metric(stand, "gateway_model_seconds_count", version="1.0.0", kind="batch") == 1
    assert metric(stand, "gateway_stage_seconds_count", route="/predict", stage="model") == 1
    assert metric(stand, "gateway_confidence_count", **{"class": "dog", "version": "1.0.0"}) == 3


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
        'gateway_capacity{kind="predict"} 7.0',
        'gateway_waiting{kind="predict"} 0.0',
    } <= lines
    free, size = (metric(stand, f"gateway_disk_{name}_bytes", folder="plan") for name in ("free", "size"))
    assert 0 < free < size


def test_unknown_paths_and_methods_share_one_label(stand: Stand) -> None:
    for path in ("/a", "/b", "/v2/models/x/y/z"):
        stand.client.get(path)
    stand.client.request("BREW", "/c")
    assert metric(stand, "gateway_requests_total", route="unmatched", status="404") == 4
    assert "/a" not in stand.client.get("/metrics").text
    assert "BREW" not in stand.client.get("/metrics").text


def test_a_v2_path_is_counted_by_its_pattern(stand: Stand) -> None:
    stand.client.get("/v2/models/cifar10/versions/1.0.0/ready")
    route = "/v2/models/{model}/versions/{version}/ready"
    assert metric(stand, "gateway_requests_total", route=route, status="200") == 1


def test_a_request_is_one_line_with_its_times_and_neither_image_nor_key(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gateway"):
        stand.client.post("/predict", content=b"the-image", headers={"x-api-key": "the-key", "x-request-id": "r-1"})
    (record,) = [record for record in caplog.records if record.message == "request"]
    line = JsonFormatter().format(record)
    data: dict[str, Any] = json.loads(line)
    wanted = {"request_id": "r-1", "route": "/predict", "status": 200, "version": "1.0.0", "method": "POST"}
    assert wanted.items() <= data.items()
    assert {"ms", "body_ms", "wait_ms", "model_ms"} <= set(data)
    assert "the-image" not in line
    assert "the-key" not in line


def test_an_exception_stays_on_its_one_line() -> None:
    error = ValueError("two\nlines")
    record = logging.getLogger("gateway").makeRecord(
        "gateway", logging.ERROR, __file__, 1, "it %s", ("failed",), (ValueError, error, None)
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    data = json.loads(line)
    assert data["message"] == "it failed"
    assert "ValueError: two\nlines" in data["exception"]


def test_the_level_is_the_gateways_own() -> None:
    assert logging_config("warning")["loggers"]["gateway"]["level"] == "WARNING"


@pytest.mark.parametrize("kind", ["predict", "batch", "explain"])
def test_a_versions_failures_are_counted_as_its_own_and_not_timed(stand: Stand, kind: str) -> None:
    def call(image: bytes) -> None:
        if kind == "batch":
            # The other image has a prediction, so the call is answered.
            files = [("file", ("x", b"image-of-dog")), ("file", ("x", image))]
            assert stand.client.post("/predict/batch", files=files).status_code == 200
        else:
            assert stand.client.post(f"/{kind}", content=image).status_code != 200

    call(b"bad:handler_failed")
    by_version = {"version": "1.0.0", "kind": kind}
    assert metric(stand, "gateway_version_requests_total", **by_version, outcome="handler_failed") == 1
    assert metric(stand, "gateway_model_seconds_count", **by_version) == 0
    call(b"bad:image_unreadable")
    outcome = "ok" if kind == "batch" else "image_unreadable"
    assert metric(stand, "gateway_version_requests_total", **by_version, outcome=outcome) == 1


@pytest.mark.parametrize(("timeout_ms", "outcome"), [(100, "caller_deadline"), (600, "deadline_passed")])
def test_a_callers_short_deadline_does_not_count_against_the_version(
    make_stand: Callable[..., Stand], timeout_ms: int, outcome: str
) -> None:
    async def never(_request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        raise AssertionError

    stand = make_stand(upstream=never, timeout_s=1.0)
    headers = {"x-timeout-ms": str(timeout_ms)}
    assert stand.client.post("/predict", content=b"image-of-dog", headers=headers).status_code == 504
    assert metric(stand, "gateway_version_requests_total", version="1.0.0", outcome=outcome) == 1
    assert metric(stand, "gateway_version_requests_total", version="1.0.0") == 1


def test_a_request_refused_before_a_version_was_chosen_counts_for_no_version(stand: Stand) -> None:
    stand.client.post("/predict", content=b"")
    assert metric(stand, "gateway_version_requests_total", version="1.0.0") == 0


def test_many_classes_share_a_label_and_hide_no_failure() -> None:
    metrics = Metrics()

    def finish(name: str, code: str = "") -> None:
        context = RequestContext("a request")
        context.route, context.model, context.version, context.code = "/predict", "cifar10", "1.0.0", code
        context.stages["model"] = 0.001
        context.entries = [] if code else [{"class": name, "confidence": 0.9}]
        metrics.finish("POST", context)

    for number in range(2100):
        finish(f"c{number}")
    finish("", "handler_failed")
    lines = metrics.render().decode().splitlines()
    assert 'gateway_confidence_count{class="c1999",model="cifar10",version="1.0.0"} 1.0' in lines
    assert 'gateway_confidence_count{class="other",model="cifar10",version="1.0.0"} 100.0' in lines
    assert (
        'gateway_version_requests_total{kind="predict",model="cifar10",outcome="handler_failed",version="1.0.0"} 1.0'
        in lines
    )
    assert 'gateway_refused_total{code="handler_failed"} 1.0' in lines
