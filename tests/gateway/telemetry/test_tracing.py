"""Traces continue the caller's context, have the outcome, and are passed to the handler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_a_span_continues_the_callers_trace_and_travels_on(make_stand: Callable[..., Stand]) -> None:
    spans = InMemorySpanExporter()
    stand = make_stand(tracer=Tracer(SimpleSpanProcessor(spans)))
    caller = f"00-{TRACE}-b7ad6b7169203331-01"
    stand.client.post("/predict", content=b"x", headers={"traceparent": caller})
    (span,) = spans.get_finished_spans()
    assert span.name == "POST /predict"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["gradserve.version"] == "1.0.0"
    sent = json.loads(stand.torchserve.calls[0].headers["x-gradserve"])
    assert sent["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"


def test_a_broken_context_begins_a_new_trace(make_stand: Callable[..., Stand]) -> None:
    spans = InMemorySpanExporter()
    stand = make_stand(tracer=Tracer(SimpleSpanProcessor(spans)))
    stand.client.get("/livez", headers={"traceparent": "nonsense\xff".encode("latin-1")})
    assert spans.get_finished_spans()[0].parent is None


def test_without_a_collector_opentelemetrys_sdk_is_not_imported() -> None:
    # FastAPI imports OpenTelemetry's API if it is installed; expensive is only the SDK with its threads and exporter.
    heavy = "'gateway.telemetry.tracing', 'opentelemetry.sdk.trace', 'opentelemetry.exporter'"
    code = f"import sys, gateway.app; gateway.app.create_app(); print([m for m in ({heavy}) if m in sys.modules])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
