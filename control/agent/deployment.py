"""One version on its way from the plan to READY, verified and routable, and out again: its state, and what to do next.

The decision (`next_step`) is a pure function of state and time; the reconciler carries it out.
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

# A worker process that dies at load is started again by TorchServe after 1, 1, 2, 3, 5 … s: three pids for each
# worker without one READY mean that it will not load.
_CRASHES = 3
# TorchServe gives a dead worker up after the archive's maxRetryTimeoutInSec and then queues requests for it for ever.
# Workers that have all been dead for this long are started anew; where only some are, others are added beside them.
_DEAD_S = 90.0
_REVIVE_MOST_S = 3600.0
_RETRY_FIRST_S, _RETRY_MOST_S = 5.0, 300.0


class Step(enum.Enum):
    """What the reconciler does next for one version."""

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
    """What the plan wants of one version: its role, its archive, its workers."""

    model: str
    version: str
    role: Role
    archive: str
    sha256: str
    workers: int
    explain_workers: int


@dataclass
class Deployment:
    """One version's state. Times are of the monotonic clock, in seconds."""

    wanted: Wanted
    archive: Archive | None = None
    contract: Contract | None = None
    predict: Registered | None = None
    explain: Registered | None = None
    verified: bool = False
    """It predicts what training computed."""
    explains: bool | None = None
    """Whether it answered an explanation; None: not asked yet."""
    verifying: bool = False
    runs_engine: bool = True
    """Whether it was verified on its contract's engine; False: on the fallback."""
    on_fallback: dict[Kind, int] = field(default_factory=dict)
    """READY workers that run the fallback engine."""
    defaults: set[Kind] = field(default_factory=set)
    """The entries of which TorchServe was told that calls without a version mean this one."""
    reason: str | None = None
    failed: bool = False
    failures: int = 0
    retry_at: float = 0.0
    explain_failures: int = 0
    explain_retry_at: float = 0.0
    loading_since: float | None = None
    load_pids: set[int] = field(default_factory=set)
    dead_since: dict[Kind, float] = field(default_factory=dict)
    """Since when no worker has been READY."""
    short_since: dict[Kind, float] = field(default_factory=dict)
    """Since when some workers, but fewer than wanted, have been READY."""
    revivals: dict[Kind, int] = field(default_factory=dict)
    revive_at: dict[Kind, float] = field(default_factory=dict)
    busy_until: float | None = None
    """When it was last routable or had something pending; None: never."""
    out_since: float | None = None
    """Since when gateways have been told not to send to it; None: they may."""
    task: asyncio.Task[None] | None = None
    acted_at: float = 0.0
    """When the last step ended: what was seen before says nothing about its effect."""

    @property
    def routable(self) -> bool:
        """Whether gateways may send to it."""
        role = self.wanted.role
        return self.verified and role != "retiring" and self.predict is not None and self.predict.ready > 0

    @property
    def state(self) -> State:
        """The one word for people and gateways."""
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
    def trouble(self) -> str | None:
        """The reason for people, None when all is well."""
        if self.reason is None and self.has_fallen_back:
            ready = {kind: entry.ready for kind, entry in self.entries() if entry is not None}
            counts = [f"{count} of {ready[kind]} {kind}" for kind, count in self.on_fallback.items() if count]
            return f"{' and '.join(counts)} workers run the fallback engine; TorchServe's log says why"
        if self.reason is None and self.verified and not self.runs_engine:
            return "its engine cannot run on this machine; the fallback serves"
        return self.reason

    def entries(self) -> tuple[tuple[Kind, Registered | None], ...]:
        """Return its two TorchServe entries, None where one is not registered."""
        return ("predict", self.predict), ("explain", self.explain)

    def wanted_workers(self, kind: Kind) -> int:
        """Return the number of workers that the plan wants of an entry."""
        return self.wanted.workers if kind == "predict" else self.wanted.explain_workers

    @property
    def pending(self) -> int:
        """Jobs that wait in its queues, by the last look."""
        return sum(entry.pending or 0 for entry in (self.predict, self.explain) if entry is not None)

    def see(
        self,
        predict: Registered | None,
        explain: Registered | None,
        now: float,
        fallen_back: AbstractSet[int] = frozenset(),
    ) -> None:
        """Takes in what TorchServe says of the two entries; `fallen_back`: pids of workers on the fallback engine."""
        if explain is not None and self.explain is None and self.explain_failures:  # taken in after all
            self.explain_failures, self.explain_retry_at, self.explains, self.reason = 0, 0.0, None, None
        self.predict, self.explain = predict, explain
        if self.routable or self.pending:
            self.busy_until = now
        if self.routable:
            self.out_since = None
        elif self.out_since is None:
            self.out_since = now
        for kind, entry in self.entries():
            workers = entry.workers if entry is not None else ()
            ready = sum(worker.ready for worker in workers)
            self.on_fallback[kind] = sum(worker.ready and worker.pid in fallen_back for worker in workers)
            _note(self.dead_since, kind, now, is_so=bool(workers) and not ready)
            _note(self.short_since, kind, now, is_so=0 < ready < self.wanted_workers(kind))
            if kind not in self.short_since and now >= self.revive_at.get(kind, now):
                self.revivals.pop(kind, None)
        if self.verified or predict is None:
            self.loading_since = None
            self.load_pids.clear()
        else:
            self.loading_since = now if self.loading_since is None else self.loading_since
            self.load_pids |= {worker.pid for worker in predict.workers if worker.pid is not None}

    def fail(self, reason: str, now: float) -> None:
        """Marks it failed; it is unregistered and tried again later, later each time."""
        self.failed, self.verified, self.verifying, self.reason = True, False, False, reason
        self.explains = None
        self.failures += 1
        self.retry_at = now + _pause_s(self.failures)

    def fail_explanations(self, reason: str, now: float) -> None:
        """Notes that TorchServe did not take the explainers in; predictions go on, and it is tried again later."""
        self.explains, self.reason = False, reason
        self.explain_failures += 1
        self.explain_retry_at = now + _pause_s(self.explain_failures)

    def note_revival(self, kind: Kind, now: float) -> None:
        """Notes that workers were added; the next ones are added later, later each time."""
        self.revivals[kind] = self.revivals.get(kind, 0) + 1
        self.revive_at[kind] = now + min(_REVIVE_MOST_S, _DEAD_S * 2.0 ** self.revivals[kind])

    def replace(self, wanted: Wanted, now: float) -> None:
        """Takes over a changed wish; other bytes under the same version have to be loaded anew."""
        self.defaults.clear()
        same_bytes = (wanted.archive, wanted.sha256) == (self.wanted.archive, self.wanted.sha256)
        self.wanted = wanted
        if not same_bytes:
            self.failed, self.verified, self.reason = True, False, "the plan names other bytes for this version"
            self.explains = None
            self.archive, self.failures, self.retry_at = None, 0, now

    def start_over(self) -> None:
        """Forgets everything that a restart of TorchServe makes untrue."""
        self.archive, self.predict, self.explain = None, None, None
        self.verified, self.verifying, self.failed, self.failures = False, False, False, 0
        self.reason, self.loading_since, self.busy_until, self.explains = None, None, None, None
        self.out_since = None
        self.explain_failures, self.explain_retry_at = 0, 0.0
        self.runs_engine = True
        for seen in (self.defaults, self.load_pids):
            seen.clear()
        for noted in (self.on_fallback, self.dead_since, self.short_since, self.revivals, self.revive_at):
            noted.clear()


def _note(since: dict[Kind, float], kind: Kind, now: float, *, is_so: bool) -> None:
    """Keeps since when something has been so, and forgets it when it is not."""
    if is_so:
        since.setdefault(kind, now)
    else:
        since.pop(kind, None)


def _pause_s(failures: int) -> float:
    return min(_RETRY_MOST_S, _RETRY_FIRST_S * 2.0 ** (failures - 1))


def next_step(
    deployment: Deployment, now: float, *, load_timeout_s: float, settle_s: float, let_go: bool | None = None
) -> Step:
    """What to do next for `deployment` at the monotonic time `now`.

    `let_go`: whether every gateway process has said that it neither sends nor waits for anything there; None: no
    gateway says anything, and idleness for `settle_s` has to do.
    """
    if deployment.failed or deployment.wanted.role == "retiring":
        return _way_out(deployment, now, settle_s, let_go=let_go)
    if deployment.archive is None:
        return Step.INSPECT
    if deployment.predict is None:
        return Step.REGISTER_PREDICT
    if not deployment.verified:
        return _way_in(deployment, now, load_timeout_s)
    return _upkeep(deployment, now)


def _way_out(deployment: Deployment, now: float, settle_s: float, *, let_go: bool | None) -> Step:
    """Routing has stopped already; nothing is unregistered that may still be asked."""
    if deployment.predict is not None or deployment.explain is not None:
        idle_since = deployment.busy_until
        if idle_since is None:
            return Step.UNREGISTER
        has_settled = let_go if let_go is not None else now - idle_since >= settle_s
        return Step.UNREGISTER if has_settled and not deployment.pending else Step.NOTHING
    if deployment.wanted.role == "retiring":
        return Step.FORGET
    return Step.RETRY if now >= deployment.retry_at else Step.NOTHING


def _way_in(deployment: Deployment, now: float, load_timeout_s: float) -> Step:
    if deployment.predict is not None and deployment.predict.ready:
        return Step.VERIFY
    if len(deployment.load_pids) >= _CRASHES * deployment.wanted.workers:
        return Step.FAIL_CRASHES
    if deployment.loading_since is not None and now - deployment.loading_since > load_timeout_s:
        return Step.FAIL_SLOW
    return Step.NOTHING


def _upkeep(deployment: Deployment, now: float) -> Step:
    """Drift of a verified version. No worker is taken away while it is routable: TorchServe does not drain them."""
    wanted, predict, explain = deployment.wanted, deployment.predict, deployment.explain
    drift = {
        # First: what is below may fail again and again.
        Step.RECYCLE_PREDICT: now - deployment.dead_since.get("predict", now) >= _DEAD_S,
        Step.RECYCLE_EXPLAIN: now - deployment.dead_since.get("explain", now) >= _DEAD_S,
        Step.REVIVE_PREDICT: _must_revive(deployment, "predict", predict, now),
        Step.REVIVE_EXPLAIN: _must_revive(deployment, "explain", explain, now),
        # After predictions are served: loading takes the processor from workers that callers wait for.
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
    """Return the registered entries of which TorchServe has not been told that this version is the default."""
    return {kind for kind, entry in deployment.entries() if entry is not None} - deployment.defaults


def _must_revive(deployment: Deployment, kind: Kind, entry: Registered | None, now: float) -> bool:
    """Return True if some workers have been missing for long, and one of them has no process any more."""
    lasts = now - deployment.short_since.get(kind, now) >= _DEAD_S
    return lasts and now >= deployment.revive_at.get(kind, now) and entry is not None and entry.dead > 0
