"""Prometheus metrics, right with several gateway processes: each writes its own files, whoever is asked adds them up.

Gunicorn's configuration names the folder (`PROMETHEUS_MULTIPROC_DIR`) before this is imported; without it, in tests,
one process counts for itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from gateway.admission import Places
    from gateway.exchange import Exchange

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Each a quarter more than the one before: a version whose p99 is a third worse than another's shows it.
MODEL_SECONDS = tuple(round(0.001 * 2 ** (step / 3), 6) for step in range(41))
CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
METHODS = {"GET", "HEAD", "POST"}
KINDS = {"/predict": "predict", "/explain": "explain"}  # every other route that asks a version asks it a batch
# Labels are our own routes, stages, codes and versions; only a contract can bring a great many, its classes. Past this
# many of a process's versions together, new ones are counted as `other`.
MAX_CLASS_LABELS = 2000
# Likewise of callers' keys, for which an operator may have made any number.
MAX_KEY_LABELS = 1000


class Metrics:
    """The gateway's own metrics. Label lookups are cached, because they cost more than the counting."""

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
        self._refused = Counter("gateway_refused", "Requests refused or failed, by code.", ("code",), registry=registry)
        self._versions = Counter(
            "gateway_version_requests",
            "Requests by the version asked and what came of them: ok, or the problem's code.",
            ("version", "kind", "outcome"),
            registry=registry,
        )
        self._model = Histogram(
            "gateway_model_seconds",
            "Seconds in which a version answered requests that came out ok.",
            ("version", "kind"),
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
            ("version", "outcome"),
            registry=registry,
        )
        # Two sums, because a rate takes a falling one for a restart: up - down is the shift, up + down its size.
        self._shift = Counter(
            "gateway_shadow_shift",
            "Sum of the confidences by which a shadow was above (up) or below (down) the stable version's.",
            ("version", "direction"),
            registry=registry,
        )
        self._confidence = Histogram(
            "gateway_confidence",
            "Confidence of the predicted class.",
            ("version", "class"),
            buckets=CONFIDENCES,
            registry=registry,
        )
        self._in_flight = Gauge(
            "gateway_in_flight",
            "Places taken, sampled.",
            ("kind",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._plan_broken = Gauge(
            "gateway_plan_broken",
            "1 while a process cannot use the traffic plan's file and goes on by the last good one.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._children: dict[tuple[object, ...], Counter | Histogram] = {}
        self._classes: set[tuple[str, str]] = set()
        self._keys: set[tuple[str, str]] = set()

    def finish(self, method: str, exchange: Exchange) -> None:
        """Counts an answered request."""
        route = exchange.route
        method = method if method in METHODS else "other"
        self._counter(self._requests, route, method, str(exchange.status)).inc()
        self._histogram(self._seconds, route).observe(exchange.elapsed_s())
        for stage, seconds in exchange.stages.items():
            self._histogram(self._stages, route, stage).observe(seconds)
        if exchange.code:
            self._counter(self._refused, exchange.code).inc()
        if exchange.version:
            kind = KINDS.get(route, "batch")
            hurried = exchange.is_hurried and exchange.code == "deadline_passed"
            outcome = "caller_deadline" if hurried else exchange.code or "ok"
            self._counter(self._versions, exchange.version, kind, outcome).inc()
            if not exchange.code:
                self._histogram(self._model, exchange.version, kind).observe(exchange.stages["model"])
        if exchange.caller:
            self._count_usage(exchange)
        for entry in exchange.entries:
            if "class" in entry:
                label = self._class_label(exchange.version, entry["class"])
                self._histogram(self._confidence, exchange.version, label).observe(entry["confidence"])

    def count_refused(self, route: str, count: int) -> None:
        """Counts calls refused for want of a place; not their times, which would hide how slow the answers are."""
        self._counter(self._requests, route, "POST", "503").inc(count)
        self._counter(self._refused, "saturated").inc(count)

    def count_mirrored(self, version: str, outcome: str, images: int = 1) -> None:
        """Counts images that were to be mirrored to the shadow `version`."""
        self._counter(self._shadow, version, outcome).inc(images)

    def observe_shift(self, version: str, shift: float) -> None:
        """Adds by how much more confident than the stable version the shadow was (-1 to 1)."""
        self._counter(self._shift, version, "up" if shift > 0 else "down").inc(abs(shift))

    def sample(self, kind: str, places: Places) -> None:
        """Notes how many places of a kind are taken now."""
        self._in_flight.labels(kind).set(places.taken)

    def note_plan(self, *, is_broken: bool) -> None:
        """Notes whether the traffic plan's file cannot be used."""
        self._plan_broken.set(is_broken)

    def render(self) -> bytes:
        """Everything as Prometheus's text, over all processes where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]  # prometheus-client leaves it untyped
        return generate_latest(together)

    def _count_usage(self, exchange: Exchange) -> None:
        caller, key = exchange.caller, exchange.key
        if (caller, key) not in self._keys:
            if len(self._keys) >= MAX_KEY_LABELS:
                caller, key = "other", ""
            else:
                self._keys.add((caller, key))
        self._counter(self._callers, caller, key, str(exchange.status)).inc()
        is_explained = exchange.status == 200 and exchange.route == "/explain"
        images = int(is_explained) or sum("class" in entry for entry in exchange.entries)
        if images:
            self._counter(self._caller_images, caller).inc(images)

    def _class_label(self, version: str, name: str) -> str:
        if (version, name) not in self._classes:
            if len(self._classes) >= MAX_CLASS_LABELS:
                return "other"
            self._classes.add((version, name))
        return name

    def _counter(self, metric: Counter, *labels: str) -> Counter:
        child = self._child(metric, labels)
        assert isinstance(child, Counter)  # noqa: S101 — the cache is keyed by the metric
        return child

    def _histogram(self, metric: Histogram, *labels: str) -> Histogram:
        child = self._child(metric, labels)
        assert isinstance(child, Histogram)  # noqa: S101 — the cache is keyed by the metric
        return child

    def _child(self, metric: Counter | Histogram, labels: tuple[str, ...]) -> Counter | Histogram:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child
