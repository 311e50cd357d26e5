"""OpenTelemetry traces: one span per request, which continues the caller's W3C context and is passed to the handler.

This module is imported only if `GATEWAY_OTLP_ENDPOINT` is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span
    from starlette.types import Scope

    from gateway.request_context import RequestContext

PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """Begins and ends the spans of requests; `processor` gets the finished ones."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "gradserve-gateway"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("gateway")

    def begin(self, scope: Scope) -> tuple[Span, str]:
        """Return a new span for a request, and its trace context as the header `traceparent`."""
        names = {b"traceparent", b"tracestate"}
        carrier = {name.decode("ascii"): value.decode("latin-1") for name, value in scope["headers"] if name in names}
        span = self._tracer.start_span(scope["method"], context=PROPAGATOR.extract(carrier), kind=SpanKind.SERVER)
        own = span.get_span_context()
        return span, f"00-{own.trace_id:032x}-{own.span_id:016x}-{int(own.trace_flags):02x}"

    @staticmethod
    def end(span: Span, scope: Scope, context: RequestContext) -> None:
        """Set the span's attributes from the request context, and end it."""
        span.update_name(f"{scope['method']} {context.route}")
        span.set_attributes(
            {
                "http.request.method": scope["method"],
                "http.route": context.route,
                "http.response.status_code": context.status,
                "gradserve.request_id": context.request_id,
                "gradserve.version": context.version,
                "gradserve.code": context.code,
                "gradserve.row": context.batch_id,
                **{f"gradserve.{stage}_ms": seconds * 1000 for stage, seconds in context.stages.items()},
            }
        )
        if context.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()


def exporting_tracer(endpoint: str) -> Tracer:
    """Return a tracer whose own thread sends spans in batches to the OTLP/HTTP collector at `endpoint`."""
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)))
