"""What is counted and what is logged: bounded labels, times, no picture, no key."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from gateway.logs import JsonFormatter, logging_config

if TYPE_CHECKING:
    import pytest
    from conftest import Stand


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
    assert metric(stand, "gateway_version_requests_total", route="/predict", version="1.0.0") == 1
    assert metric(stand, "gateway_stage_seconds_count", route="/predict", stage="model") == 1
    assert metric(stand, "gateway_confidence_count", **{"class": "dog", "version": "1.0.0"}) == 3


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


def test_a_request_is_one_line_with_its_times_and_neither_picture_nor_key(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gateway"):
        stand.client.post("/predict", content=b"the-picture", headers={"x-api-key": "the-key", "x-request-id": "r-1"})
    (record,) = [record for record in caplog.records if record.message == "request"]
    line = JsonFormatter().format(record)
    data: dict[str, Any] = json.loads(line)
    wanted = {"request_id": "r-1", "route": "/predict", "status": 200, "version": "1.0.0", "method": "POST"}
    assert wanted.items() <= data.items()
    assert {"ms", "body_ms", "wait_ms", "model_ms"} <= set(data)
    assert "the-picture" not in line
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
