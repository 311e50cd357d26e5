"""Gauges of the current state: plan, replicas, workers, queues and disks.

They are the same in all gateway processes, so the process that is scraped computes them, and no file holds them.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client.metrics_core import Metric

    from gateway.inference.routing import Router
    from gateway.state import AppState


def state_metrics(state: AppState) -> Iterable[Metric]:
    """Return the gauges; those of the disks are computed when the result is read."""
    agents, router = state.agents, state.router
    gauges = [
        _gauge("gateway_replicas_wanted", "Replicas that are configured.", {(): len(agents.replicas)}),
        _gauge("gateway_replicas_seen", "Replicas whose agent gives a fresh status.", {(): len(agents.current())}),
        _gauge(
            "gateway_stable_ready",
            "1 while workers of the stable version are ready, for predictions and for explanations.",
            {(): router.is_ready()},
        ),
        _gauge(
            "gateway_plan_broken",
            "1 while the traffic plan's file is unusable and the last usable plan is in force.",
            {(): router.plan_error is not None},
        ),
        _gauge("gateway_plan_revision", "Revision of the plan in force.", {(): router.revision or 0}),
        *_workers(router),
    ]
    return chain(gauges, _disks(state))


def _workers(router: Router) -> Iterable[Metric]:
    """Return the gauges of each version's workers and queues, summed over the replicas with a recent status."""
    ready: defaultdict[tuple[str, ...], float] = defaultdict(float)
    wanted, pending, capacity, fallback = ready.copy(), ready.copy(), ready.copy(), ready.copy()
    for _, _, seen in router.seen():
        for kind, pool in (("predict", seen.predict), ("explain", seen.explain)):
            labels = (seen.model, seen.version, seen.role, kind)
            ready[labels] += pool.ready if seen.routable else 0
            wanted[labels] += pool.wanted
            fallback[labels] += pool.fallback
            pending[labels] += pool.pending or 0
            capacity[labels] += pool.capacity or 0
    names = ("model", "version", "role", "kind")
    yield _gauge("gateway_workers_ready", "Workers that answer, of versions that are verified.", ready, names)
    yield _gauge("gateway_workers_wanted", "Workers that the plan wants.", wanted, names)
    yield _gauge("gateway_workers_fallback", "READY workers on the contract's fallback engine.", fallback, names)
    yield _gauge("gateway_queue_depth", "Upstream batches that wait in TorchServe's queues.", pending, names)
    yield _gauge("gateway_queue_capacity", "Upstream batches for which these queues have room.", capacity, names)


def _disks(state: AppState) -> Iterable[Metric]:
    """Return the free and the total bytes of the disks that hold the plan and the metrics."""
    folders = {"plan": str(state.settings.plan.parent)}
    if metrics := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        folders["metrics"] = metrics
    free: dict[tuple[str, ...], float] = {}
    size: dict[tuple[str, ...], float] = {}
    for name, folder in folders.items():
        with suppress(OSError):
            usage = shutil.disk_usage(folder)
            free[name,], size[name,] = usage.free, usage.total
    yield _gauge("gateway_disk_free_bytes", "Free bytes of a folder's disk.", free, ("folder",))
    yield _gauge("gateway_disk_size_bytes", "Bytes of a folder's disk.", size, ("folder",))


def _gauge(
    name: str, text: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        gauge.add_metric(key, float(value))
    return gauge
