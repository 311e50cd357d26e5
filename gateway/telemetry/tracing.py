"""OpenTelemetry traces: one span for each request, continuing the caller's W3C context and passed on to the model.

Nothing of it is imported, and no request pays for it, unless `GATEWAY_OTLP_ENDPOINT` is set.
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
    """Begins and ends requests' spans; `processor` takes the finished ones."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "gradserve-gateway"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("gateway")

    def begin(self, scope: Scope, exchange: RequestContext) -> Span:
        """A request's span; its context is noted in the exchange, to travel on."""
        names = {b"traceparent", b"tracestate"}
        carrier = {name.decode("ascii"): value.decode("latin-1") for name, value in scope["headers"] if name in names}
        span = self._tracer.start_span(scope["method"], context=PROPAGATOR.extract(carrier), kind=SpanKind.SERVER)
        context = span.get_span_context()
        exchange.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        return span

    @staticmethod
    def end(span: Span, scope: Scope, exchange: RequestContext) -> None:
        """Tells what came of the request, and ends its span."""
        span.update_name(f"{scope['method']} {exchange.route}")
        span.set_attributes(
            {
                "http.request.method": scope["method"],
                "http.route": exchange.route,
                "http.response.status_code": exchange.status,
                "gradserve.request_id": exchange.request_id,
                "gradserve.version": exchange.version,
                "gradserve.code": exchange.code,
                "gradserve.row": exchange.row,
                **{f"gradserve.{stage}_ms": seconds * 1000 for stage, seconds in exchange.stages.items()},
            }
        )
        if exchange.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def exporting_tracer(endpoint: str) -> Tracer:
    """A tracer that sends spans to the OTLP/HTTP collector at `endpoint`, in batches and from a thread of its own."""
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)))
