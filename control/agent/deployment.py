"""The state of one version on one TorchServe, and the next step: load, verify, maintain or unregister it.

`next_step` is a pure function of state and time; the reconciler carries the step out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Set as AbstractSet

    from contracts.model import Contract
    from control.agent.torchserve.management import Registered
    from control.archive import Archive

Role = Literal["stable", "canary", "shadow", "retained", "retiring"]
Kind = Literal["predict", "explain"]
State = Literal["loading", "verifying", "ready", "degraded", "failed"]

# TorchServe restarts a worker process that dies at load after 1, 1, 2, 3, 5 … s. Three pids for each worker without one
# READY mean that the version cannot be loaded.
_CRASHES = 3
# TorchServe gives a dead worker up after the archive's maxRetryTimeoutInSec, and then queues its requests without end.
# If all workers have been dead for this long they are recycled; if only some have, as many are added.
_DEAD_S = 90.0
_REVIVE_MOST_S = 3600.0
_RETRY_FIRST_S, _RETRY_MOST_S = 5.0, 300.0


class Step(enum.Enum):
    """The steps that the reconciler can take for one version."""

    NOTHING = enum.auto()
    INSPECT = enum.auto()
    REGISTER_PREDICT = enum.auto()
    REGISTER_EXPLAIN = enum.auto()
    SCALE_PREDICT = enum.auto()
    SCALE_EXPLAIN = enum.auto()
    RECYCLE_PREDICT = enum.auto()
    RECYCLE_EXPLAIN = enum.auto()
    REVIVE_PREDICT = enum.auto()
    REVIVE_EXPLAIN = enum.auto()
    VERIFY = enum.auto()
    VERIFY_EXPLAIN = enum.auto()
    SET_DEFAULT = enum.auto()
    UNREGISTER = enum.auto()
    FAIL_CRASHES = enum.auto()
    FAIL_SLOW = enum.auto()
    RETRY = enum.auto()
    FORGET = enum.auto()


@dataclass(frozen=True)
class Wanted:
    """The plan's entry for one version: its role, its archive, its workers."""

    model: str
    version: str
    role: Role
    archive: str
    sha256: str
    workers: int
    explain_workers: int
    source: str | None = None


@dataclass
class Deployment:
    """One version's state. Times are of the monotonic clock, in seconds."""

    wanted: Wanted
    archive: Archive | None = None
    contract: Contract | None = None
    predict: Registered | None = None
    explain: Registered | None = None
    verified: bool = False
    """True if it predicts what training computed."""
    explains: bool | None = None
    """True if its explanation was verified, False if that failed, None before."""
    verifying: bool = False
    runs_engine: bool = True
    """True if it was verified on its contract's engine, False if on the fallback."""
    on_fallback: dict[Kind, int] = field(default_factory=dict)
    """Number of READY workers that run the fallback engine."""
    defaults: set[Kind] = field(default_factory=set)
    """The entries whose default version in TorchServe is this one."""
    reason: str | None = None
    failed: bool = False
    failures: int = 0
    retry_at: float = 0.0
    explain_failures: int = 0
    explain_retry_at: float = 0.0
    loading_since: float | None = None
    load_pids: set[int] = field(default_factory=set)
    dead_since: dict[Kind, float] = field(default_factory=dict)
    """Time since which no worker has been READY."""
    incomplete_since: dict[Kind, float] = field(default_factory=dict)
    """Time since which some workers, but fewer than wanted, have been READY."""
    revivals: dict[Kind, int] = field(default_factory=dict)
    revive_at: dict[Kind, float] = field(default_factory=dict)
    busy_until: float | None = None
    """Time at which it was last routable or had pending jobs; None: never."""
    unroutable_since: float | None = None
    """Time since which it has not been routable; None while it is."""
    task: asyncio.Task[None] | None = None
    acted_at: float = 0.0
    """Time at which the last step ended; an earlier observation does not show its effect."""

    @property
    def routable(self) -> bool:
        """Return True if gateways may send requests to it."""
        role = self.wanted.role
        return self.verified and role != "retiring" and self.predict is not None and self.predict.ready > 0

    @property
    def state(self) -> State:
        """Return the state that the status page reports."""
        if self.failed:
            return "failed"
        if self.verifying:
            return "verifying"
        if not self.verified:
            return "loading"
        ready = (self.predict.ready if self.predict else 0, self.explain.ready if self.explain else 0)
        complete = ready[0] >= self.wanted.workers and ready[1] >= self.wanted.explain_workers
        return "ready" if complete and self.explains and not self.has_fallen_back else "degraded"

    @property
    def has_fallen_back(self) -> bool:
        """Return True if workers run the fallback engine though the engine was verified here, or others run it."""
        if not any(self.on_fallback.values()):
            return False
        return self.runs_engine or any(
            self.on_fallback.get(kind, 0) < entry.ready for kind, entry in self.entries() if entry is not None
        )

    @property
    def shown_reason(self) -> str | None:
        """Return the reason of the status page why the version is not fully ready; None if it is."""
        if self.reason is None and self.has_fallen_back:
            ready = {kind: entry.ready for kind, entry in self.entries() if entry is not None}
            counts = [f"{count} of {ready[kind]} {kind}" for kind, count in self.on_fallback.items() if count]
            return f"{' and '.join(counts)} workers run the fallback engine; TorchServe's log says why"
        if self.reason is None and self.verified and not self.runs_engine:
            return "its engine cannot run on this machine; the fallback serves"
        return self.reason

    def entries(self) -> tuple[tuple[Kind, Registered | None], ...]:
        """Return its two TorchServe entries; None for one that is not registered."""
        return ("predict", self.predict), ("explain", self.explain)

    def wanted_workers(self, kind: Kind) -> int:
        """Return the number of workers that the plan wants of an entry."""
        return self.wanted.workers if kind == "predict" else self.wanted.explain_workers

    @property
    def pending(self) -> int:
        """Return the number of jobs in its queues, by the last observation."""
        return sum(entry.pending or 0 for entry in (self.predict, self.explain) if entry is not None)

    def update(
        self,
        predict: Registered | None,
        explain: Registered | None,
        now: float,
        fallback_pids: AbstractSet[int] = frozenset(),
    ) -> None:
        """Update the state from TorchServe's two entries and the pids of the workers on the fallback engine."""
        if explain is not None and self.explain is None and self.explain_failures:  # registered after failed attempts
            self.explain_failures, self.explain_retry_at, self.explains, self.reason = 0, 0.0, None, None
        self.predict, self.explain = predict, explain
        if self.routable or self.pending:
            self.busy_until = now
        if self.routable:
            self.unroutable_since = None
        elif self.unroutable_since is None:
            self.unroutable_since = now
        for kind, entry in self.entries():
            workers = entry.workers if entry is not None else ()
            ready = sum(worker.ready for worker in workers)
            self.on_fallback[kind] = sum(worker.ready and worker.pid in fallback_pids for worker in workers)
            _track(self.dead_since, kind, now, is_true=bool(workers) and not ready)
            _track(self.incomplete_since, kind, now, is_true=0 < ready < self.wanted_workers(kind))
            if kind not in self.incomplete_since and now >= self.revive_at.get(kind, now):
                self.revivals.pop(kind, None)
        if self.verified or predict is None:
            self.loading_since = None
            self.load_pids.clear()
        else:
            self.loading_since = now if self.loading_since is None else self.loading_since
            self.load_pids |= {worker.pid for worker in predict.workers if worker.pid is not None}

    def fail(self, reason: str, now: float) -> None:
        """Mark it as failed; it is unregistered and retried with growing pauses."""
        self.failed, self.verified, self.verifying, self.reason = True, False, False, reason
        self.explains = None
        self.failures += 1
        self.retry_at = now + _pause_s(self.failures)

    def fail_explanations(self, reason: str, now: float) -> None:
        """Record that the explain entry failed; predictions continue, and it is retried with growing pauses."""
        self.explains, self.reason = False, reason
        self.explain_failures += 1
        self.explain_retry_at = now + _pause_s(self.explain_failures)

    def note_revival(self, kind: Kind, now: float) -> None:
        """Record that workers were added; the next ones are added with growing pauses."""
        self.revivals[kind] = self.revivals.get(kind, 0) + 1
        self.revive_at[kind] = now + min(_REVIVE_MOST_S, _DEAD_S * 2.0 ** self.revivals[kind])

    def replace(self, wanted: Wanted, now: float) -> None:
        """Take over a changed entry of the plan; other bytes of the same version have to be loaded again."""
        self.defaults.clear()
        same_bytes = (wanted.archive, wanted.sha256) == (self.wanted.archive, self.wanted.sha256)
        self.wanted = wanted
        if not same_bytes:
            self.failed, self.verified, self.reason = True, False, "the plan names other bytes for this version"
            self.explains = None
            self.archive, self.failures, self.retry_at = None, 0, now

    def start_over(self) -> None:
        """Reset everything that is no longer true after a restart of TorchServe."""
        self.archive, self.predict, self.explain = None, None, None
        self.verified, self.verifying, self.failed, self.failures = False, False, False, 0
        self.reason, self.loading_since, self.busy_until, self.explains = None, None, None, None
        self.unroutable_since = None
        self.explain_failures, self.explain_retry_at = 0, 0.0
        self.runs_engine = True
        for found in (self.defaults, self.load_pids):
            found.clear()
        for by_kind in (self.on_fallback, self.dead_since, self.incomplete_since, self.revivals, self.revive_at):
            by_kind.clear()


def _track(since: dict[Kind, float], kind: Kind, now: float, *, is_true: bool) -> None:
    """Keep the time since which a condition has been true; drop it when the condition is false."""
    if is_true:
        since.setdefault(kind, now)
    else:
        since.pop(kind, None)


def _pause_s(failures: int) -> float:
    return min(_RETRY_MOST_S, _RETRY_FIRST_S * 2.0 ** (failures - 1))


def next_step(
    deployment: Deployment, now: float, *, load_timeout_s: float, settle_s: float, is_released: bool | None = None
) -> Step:
    """Return the next step for `deployment` at the monotonic time `now`.

    `is_released` is True if every gateway process has reported that it neither sends to the version nor waits for its
    answers, False if one has not. None: no gateway reports, and `settle_s` seconds of idleness count as released.
    """
    if deployment.failed or deployment.wanted.role == "retiring":
        return _unload_step(deployment, now, settle_s, is_released=is_released)
    if deployment.archive is None:
        return Step.INSPECT
    if deployment.predict is None:
        return Step.REGISTER_PREDICT
    if not deployment.verified:
        return _load_step(deployment, now, load_timeout_s)
    return _maintenance_step(deployment, now)


def _unload_step(deployment: Deployment, now: float, settle_s: float, *, is_released: bool | None) -> Step:
    """Return the next step of a version that is not routed any more; it stays registered while a request may come."""
    if deployment.predict is not None or deployment.explain is not None:
        idle_since = deployment.busy_until
        if idle_since is None:
            return Step.UNREGISTER
        has_settled = is_released if is_released is not None else now - idle_since >= settle_s
        return Step.UNREGISTER if has_settled and not deployment.pending else Step.NOTHING
    if deployment.wanted.role == "retiring":
        return Step.FORGET
    return Step.RETRY if now >= deployment.retry_at else Step.NOTHING


def _load_step(deployment: Deployment, now: float, load_timeout_s: float) -> Step:
    if deployment.predict is not None and deployment.predict.ready:
        return Step.VERIFY
    if len(deployment.load_pids) >= _CRASHES * deployment.wanted.workers:
        return Step.FAIL_CRASHES
    if deployment.loading_since is not None and now - deployment.loading_since > load_timeout_s:
        return Step.FAIL_SLOW
    return Step.NOTHING


def _maintenance_step(deployment: Deployment, now: float) -> Step:
    """Return the next step of a verified version. No worker is removed while it is routable: TorchServe drains none."""
    wanted, predict, explain = deployment.wanted, deployment.predict, deployment.explain
    drift = {
        # First, because the steps below may fail repeatedly.
        Step.RECYCLE_PREDICT: now - deployment.dead_since.get("predict", now) >= _DEAD_S,
        Step.RECYCLE_EXPLAIN: now - deployment.dead_since.get("explain", now) >= _DEAD_S,
        Step.REVIVE_PREDICT: _must_revive(deployment, "predict", predict, now),
        Step.REVIVE_EXPLAIN: _must_revive(deployment, "explain", explain, now),
        # After predictions are served: loading takes processor time from the workers that serve.
        Step.REGISTER_EXPLAIN: explain is None and now >= deployment.explain_retry_at,
        Step.SCALE_PREDICT: predict is not None and predict.min_workers < wanted.workers,
        Step.SCALE_EXPLAIN: explain is not None and explain.min_workers < wanted.explain_workers,
        Step.VERIFY_EXPLAIN: not deployment.explains
        and explain is not None
        and explain.ready > 0
        and now >= deployment.explain_retry_at,
        Step.SET_DEFAULT: wanted.role == "stable" and bool(missing_defaults(deployment)),
    }
    return next((step for step, is_due in drift.items() if is_due), Step.NOTHING)


def missing_defaults(deployment: Deployment) -> set[Kind]:
    """Return the registered entries whose default version in TorchServe is not this one yet."""
    return {kind for kind, entry in deployment.entries() if entry is not None} - deployment.defaults


def _must_revive(deployment: Deployment, kind: Kind, entry: Registered | None, now: float) -> bool:
    """Return True if some workers have been missing for `_DEAD_S`, and one of them has no process."""
    lasts = now - deployment.incomplete_since.get(kind, now) >= _DEAD_S
    return lasts and now >= deployment.revive_at.get(kind, now) and entry is not None and entry.dead > 0
