"""Logs: one line a request, without its image and without its key."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from gateway.telemetry.logs import JsonFormatter, logging_config

if TYPE_CHECKING:
    import pytest
    from conftest import Stand


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


def test_a_line_has_the_time_in_utc_and_all_that_came_by_extra() -> None:
    record = logging.makeLogRecord(
        {"name": "gateway", "levelname": "WARNING", "msg": "saturated", "created": 1.5, "msecs": 500.0, "refused": 7}
    )
    assert json.loads(JsonFormatter().format(record)) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "warning",
        "logger": "gateway",
        "message": "saturated",
        "refused": 7,
    }


def test_other_libraries_are_logged_from_warnings_on() -> None:
    config = logging_config("debug")
    assert config["root"]["level"] == "WARNING"
    assert {name: logger["level"] for name, logger in config["loggers"].items()} == dict.fromkeys(
        ("gateway", "gunicorn.error", "uvicorn.error"), "DEBUG"
    )
