"""Logs on standard output, one JSON object per line: each request with its id, route, status, version and times.

No line has an image or an API key.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import orjson

# The attributes of every LogRecord; all others came by `extra` and are written.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """A formatter that writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line break."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((key, value) for key, value in vars(record).items() if key not in STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode("utf-8")


def logging_config(level: str) -> dict[str, Any]:
    """Return the process's logging configuration for `logging.config.dictConfig` and Gunicorn's `logconfig_dict`."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "gateway.telemetry.logs.JsonFormatter"}},
        "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
        "root": {"level": "WARNING", "handlers": ["stdout"]},
        "loggers": {
            name: {"level": level.upper(), "handlers": ["stdout"], "propagate": False}
            for name in ("gateway", "gunicorn.error", "uvicorn.error")
        },
    }
