"""Prometheus metrics for several gateway processes: each writes its own files; the one that is scraped adds them up.

Gunicorn's configuration sets the folder (`PROMETHEUS_MULTIPROC_DIR`) before this module is imported. It is in memory:
the library maps its files, and a write to a file on a full disk would kill the process. Without the folder, as in
tests, a process counts only its own calls.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics_core import Metric

    from gateway.inference.admission import ConcurrencyLimiter
    from gateway.request_context import RequestContext

Kind = TypeVar("Kind", Counter, Gauge, Histogram)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Each bound is a quarter above the one before, so that a p99 that is a third higher is visible.
MODEL_SECONDS = tuple(round(0.001 * 2 ** (step / 3), 6) for step in range(41))
CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
METHODS = {"GET", "HEAD", "POST"}
KINDS = {"/predict": "predict", "/explain": "explain"}  # every other route that calls a version is a batch
# The classes of a model are the only label that can have many values. Above this number, over all versions of a
# process, new classes are counted as `other`.
MAX_CLASS_LABELS = 2000
# The same for API keys, of which an operator may have made any number.
MAX_KEY_LABELS = 1000


class Snapshot(Collector):
    """A collector of metrics that were collected before."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self._metrics


class Metrics:
    """The gateway's metrics. Label lookups are cached, because they take longer than counting."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "gateway_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "gateway_request_seconds", "Seconds from request to answer.", ("route",), buckets=SECONDS, registry=registry
        )
        self._stages = Histogram(
            "gateway_stage_seconds",
            "Seconds in a stage: body (reading it), wait (for a place), model (TorchServe).",
            ("route", "stage"),
            buckets=SECONDS,
            registry=registry,
        )
        self._refused = Counter(
            "gateway_refused",
            "Requests refused or failed, by code and model; it is empty if the request got to none.",
            ("code", "model"),
            registry=registry,
        )
        self._versions = Counter(
            "gateway_version_requests",
            "Requests by version and outcome: ok, or the problem's code.",
            ("model", "version", "kind", "outcome"),
            registry=registry,
        )
        self._model = Histogram(
            "gateway_model_seconds",
            "Seconds that a version took for requests with the outcome ok.",
            ("model", "version", "kind"),
            buckets=MODEL_SECONDS,
            registry=registry,
        )
        self._callers = Counter(
            "gateway_caller_requests",
            "Requests by the API key's name, its id (two while it is rotated) and the status of the answer.",
            ("caller", "key", "status"),
            registry=registry,
        )
        self._caller_images = Counter(
            "gateway_caller_images",
            "Images classified or explained, by the API key's name.",
            ("caller",),
            registry=registry,
        )
        self._shadow = Counter(
            "gateway_shadow_images",
            "Images mirrored to a shadow: agree, disagree, failed (no answer), dropped (no room).",
            ("model", "version", "outcome"),
            registry=registry,
        )
        # Two sums, because a rate treats a falling sum as a restart: up - down is the shift, up + down its size.
        self._shift = Counter(
            "gateway_shadow_shift",
            "Sum of the confidences by which a shadow was above (up) or below (down) the stable version's.",
            ("model", "version", "direction"),
            registry=registry,
        )
        self._confidence = Histogram(
            "gateway_confidence",
            "Confidence of the predicted class.",
            ("model", "version", "class"),
            buckets=CONFIDENCES,
            registry=registry,
        )
        self._in_flight = self._sum("gateway_in_flight", "Calls that have a place, sampled.")
        self._waiting = self._sum("gateway_waiting", "Calls that wait for a place, sampled.")
        self._capacity = self._sum("gateway_capacity", "Places, over all gateway processes.")
        self._children: dict[tuple[object, ...], Counter | Gauge | Histogram] = {}
        self._classes: set[tuple[str, str, str]] = set()
        self._keys: set[tuple[str, str]] = set()

    def finish(self, method: str, context: RequestContext) -> None:
        """Count an answered request."""
        route = context.route
        method = method if method in METHODS else "other"
        self._count(1, self._requests, route, method, str(context.status))
        if context.code != "saturated":  # a refusal's times would hide those of served calls
            self._observe(context.elapsed_s(), self._seconds, route)
            for stage, seconds in context.stages.items():
                self._observe(seconds, self._stages, route, stage)
        if context.code:
            self._count(1, self._refused, context.code, context.model)
        if context.version:
            kind = KINDS.get(route, "batch")
            is_callers_fault = context.is_hurried and context.code == "deadline_passed"
            outcome = "caller_deadline" if is_callers_fault else context.code or "ok"
            self._count(1, self._versions, context.model, context.version, kind, outcome)
            if not context.code:
                self._observe(context.stages["model"], self._model, context.model, context.version, kind)
        if context.caller.name:
            self._count_usage(context)
        for entry in context.entries:
            if "class" in entry:
                label = self._class_label(context.model, context.version, entry["class"])
                self._observe(entry["confidence"], self._confidence, context.model, context.version, label)

    def count_mirrored(self, model: str, version: str, outcome: str, images: int = 1) -> None:
        """Count images of calls to be mirrored to the shadow `version`."""
        self._count(images, self._shadow, model, version, outcome)

    def observe_shift(self, model: str, version: str, shift: float) -> None:
        """Add the shadow's confidence minus the stable version's, from -1 to 1."""
        self._count(abs(shift), self._shift, model, version, "up" if shift > 0 else "down")

    def sample(self, model: str, kind: str, places: ConcurrencyLimiter) -> None:
        """Set the gauges of a model's calls of one kind: places, calls that have one, and calls that wait for one."""
        sampled = ((self._in_flight, places.taken), (self._waiting, places.waiting), (self._capacity, places.limit))
        for gauge, value in sampled:
            self._child(gauge, model, kind).set(value)

    def render(self, state: Iterable[Metric] = ()) -> bytes:
        """Return all metrics and `state` in Prometheus's text format, summed over the gateway processes."""
        counted: CollectorRegistry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            counted = CollectorRegistry()
            MultiProcessCollector(counted)  # type: ignore[no-untyped-call]  # prometheus-client leaves it untyped
        return generate_latest(Snapshot([*counted.collect(), *state]))

    def _sum(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model", "kind"), registry=self._registry, multiprocess_mode="livesum")

    def _count_usage(self, context: RequestContext) -> None:
        caller, key = context.caller.name, context.caller.key
        if (caller, key) not in self._keys:
            if len(self._keys) >= MAX_KEY_LABELS:
                caller, key = "other", ""
            else:
                self._keys.add((caller, key))
        self._count(1, self._callers, caller, key, str(context.status))
        is_explained = context.status == 200 and context.route == "/explain"
        images = int(is_explained) or sum("class" in entry for entry in context.entries)
        if images:
            self._count(images, self._caller_images, caller)

    def _class_label(self, model: str, version: str, name: str) -> str:
        if (model, version, name) not in self._classes:
            if len(self._classes) >= MAX_CLASS_LABELS:
                return "other"
            self._classes.add((model, version, name))
        return name

    def _count(self, amount: float, counter: Counter, *labels: str) -> None:
        self._child(counter, *labels).inc(amount)

    def _observe(self, value: float, histogram: Histogram, *labels: str) -> None:
        self._child(histogram, *labels).observe(value)

    def _child(self, metric: Kind, *labels: str) -> Kind:
        """Return the metric with these labels."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child  # type: ignore[return-value]  # the key begins with the metric
