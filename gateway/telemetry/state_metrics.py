"""Metrics of what this process sees when it is asked: plan, replicas, workers, queues, disks.

All gateway processes see the same, so the one that is asked answers alone, and nothing is kept in files.
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


def state_metrics(parts: AppState) -> Iterable[Metric]:
    """Return the gauges of what is seen now; the disks are looked at when the result is read."""
    agents, versions = parts.agents, parts.versions
    seen = [
        _gauge("gateway_replicas_wanted", "Replicas that are configured.", {(): len(agents.replicas)}),
        _gauge("gateway_replicas_seen", "Replicas whose agent gives a fresh status.", {(): len(agents.current())}),
        _gauge(
            "gateway_stable_ready",
            "1 while workers of the stable version are ready, for predictions and for explanations.",
            {(): versions.is_ready()},
        ),
        _gauge(
            "gateway_plan_broken",
            "1 while the traffic plan's file cannot be used and the last good plan is in force.",
            {(): versions.plan_error is not None},
        ),
        _gauge("gateway_plan_revision", "Revision of the plan in force.", {(): versions.revision or 0}),
        *_workers(versions),
    ]
    return chain(seen, _disks(parts))


def _workers(versions: Router) -> Iterable[Metric]:
    """Return the workers and queues of each version, over all replicas that are seen."""
    ready: defaultdict[tuple[str, ...], float] = defaultdict(float)
    wanted, pending, capacity, fallback = ready.copy(), ready.copy(), ready.copy(), ready.copy()
    for _, _, seen in versions.seen():
        for kind, pool in (("predict", seen.predict), ("explain", seen.explain)):
            labels = (seen.version, seen.role, kind)
            ready[labels] += pool.ready if seen.routable else 0
            wanted[labels] += pool.wanted
            fallback[labels] += pool.fallback
            pending[labels] += pool.pending or 0
            capacity[labels] += pool.capacity or 0
    names = ("version", "role", "kind")
    yield _gauge("gateway_workers_ready", "Workers that answer, of versions that are verified.", ready, names)
    yield _gauge("gateway_workers_wanted", "Workers that the plan wants.", wanted, names)
    yield _gauge("gateway_workers_fallback", "READY workers on the contract's fallback engine.", fallback, names)
    yield _gauge("gateway_queue_depth", "Upstream batches that wait in TorchServe's queues.", pending, names)
    yield _gauge("gateway_queue_capacity", "Upstream batches for which these queues have room.", capacity, names)


def _disks(parts: AppState) -> Iterable[Metric]:
    """Return the free and the whole bytes of the disks that this process writes to or reads the plan from."""
    folders = {"plan": str(parts.settings.plan.parent)}
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
    name: str, what: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, what, labels=labels)
    for key, value in values.items():
        gauge.add_metric(key, float(value))
    return gauge
