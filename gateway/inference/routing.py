"""Route calls: the plan gives the versions and shares, the agents' statuses say which replicas have ready workers."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

from contracts.report import counter
from gateway.errors import Unavailable
from gateway.inference.questions import explaining_entry
from gateway.kubernetes.plan_object import watch_plan
from gateway.refusals import ModelUnknown, VersionUnknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from contracts import plan as traffic_plan
    from contracts.model import Contract
    from contracts.status import AgentStatus, VersionStatus
    from gateway.inference.questions import Kind
    from gateway.inference.replicas import Agents, Replica

    EntryOf: TypeAlias = Callable[[Contract | None], Kind]
    """The TorchServe entry that answers a call, by the contract of the version."""

logger = logging.getLogger(__name__)
AVOID_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """The destination of one call: a version of a model on one replica's TorchServe, and its ready workers there.

    `entry` is the TorchServe entry of these workers; `contract` is the version's, None if the agent does not know it.

    It is a context manager, entered from the choice to the last answer of the call, which counts the call as in flight.
    The reports to the agent have this count, so that it knows when no call needs a version any more.
    """

    replica: Replica
    inference_url: str
    model: str
    version: str
    workers: int
    entry: Kind = "predict"
    contract: Contract | None = None

    def __enter__(self) -> Self:
        self.replica.in_flight[counter(self.model, self.version)] += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self.replica.in_flight[counter(self.model, self.version)] -= 1

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Keep the version loaded for a call whose upstream batches are counted one by one, each where it is sent."""
        name = counter(self.model, self.version)
        self.replica.held[name] += 1
        try:
            yield self
        finally:
            self.replica.held[name] -= 1

    @property
    def processes(self) -> int:
        """The gateway processes that have calls to the version in flight on the replica, this one included."""
        return self.replica.processes(self.model, self.version)


class Workers(NamedTuple):
    """The `ready` workers of a version on all replicas, at least one, and the gateway `processes` that call them now.

    The agents tell these, so that several gateways share the workers by what each has in flight.
    """

    ready: int
    processes: int = 1

    def share(self, least_processes: int = 1) -> int:
        """Return the workers that one process reckons with, at least one."""
        return math.ceil(self.ready / max(self.processes, least_processes))


class Router:
    """The choice of version and replica. The plan is re-read when it changes; a broken one changes nothing.

    `chance` returns random numbers in [0, 1); tests pass it in.
    """

    def __init__(self, plan_path: Path, agents: Agents, *, chance: Callable[[], float] = random.random) -> None:
        self._plan_file = watch_plan(plan_path, missing="there is no traffic plan")
        self._agents = agents
        self._chance = chance

    @property
    def plans(self) -> traffic_plan.Plans | None:
        """The plans in force; None until the file has held usable ones."""
        return self._plan_file.content

    @property
    def plan(self) -> traffic_plan.Plan | None:
        """The default model's plan in force; None until the file has held a usable one."""
        return self.plans.plan() if self.plans is not None else None

    def plan_of(self, model: str | None) -> traffic_plan.Plan:
        """Return the plan of `model`, by default of the default model.

        Raises:
            Unavailable: there is no plan.
            ModelUnknown: the plan has no such model.
        """
        if self.plans is None:
            raise Unavailable("not_ready")
        plan = self.plans.plan(model)
        if plan is None:
            raise ModelUnknown(model or "")
        return plan

    @property
    def plan_error(self) -> str | None:
        """The error in the plan's file as it is now, None if it is usable."""
        return self._plan_file.error

    @property
    def revision(self) -> int | None:
        """The revision of the plan in force, None without one."""
        return self.plans.revision if self.plans is not None else None

    def refresh_plan(self) -> None:
        """Re-read the plan's file if it has changed; log the error if it is unusable."""
        if self._plan_file.refresh() and self.plan_error is not None:
            logger.error("traffic plan not used: %s", self.plan_error, extra={"revision_in_force": self.revision})

    def seen(self) -> list[tuple[Replica, AgentStatus, VersionStatus]]:
        """Return every version in the statuses that count, of the plan's models, replica by replica."""
        names = self.plans.names() if self.plans is not None else None
        return [
            (replica, status, version)
            for replica, status in self._agents.current()
            for version in status.versions
            if names is None or version.model in names
        ]

    def is_ready(self) -> bool:
        """Return True if replicas that are not draining have READY workers of the default model's stable version.

        /readyz covers /predict and /explain with the version's default method. If that method needs a backward pass,
        or the version was packed before there were others, workers of the explain entry are needed too.
        """
        if self.plan is None:
            return False
        version = (self.plan.model, self.plan.stable.version)
        return all(self._targets(*version, entry_of(kind)) for kind in ("predict", "explain"))

    def choose(
        self,
        kind: Kind,
        version: str | None,
        caller: str = "",
        model: str | None = None,
        *,
        method: str | None = None,
    ) -> Target:
        """Return the target for a call; without `version` the shares of the model's plan choose the version.

        An explanation by `method` (None: the version's default) goes to the entry that has this method.

        Of the replicas with ready workers it is the one with the fewest calls of this process in flight for each
        worker; chance breaks ties.

        Raises:
            ModelUnknown: the plan has no such model.
            VersionUnknown: the plan does not name `version`, though it may still be loaded somewhere.
            Unavailable: there is no plan, or no verified worker of the version is ready.
        """
        plan = self.plan_of(model)
        if version is None:
            targets = self._choose_side(plan, entry_of(kind, method), caller)
        elif any(release.version == version for release in plan.releases()):
            targets = self._targets(plan.model, version, entry_of(kind, method))
        else:
            raise VersionUnknown(version)
        if not targets:
            raise Unavailable("not_ready")
        return self._least_loaded(targets)

    def workers(self, target: Target) -> Workers:
        """Return the workers of the target's entry on all replicas."""
        same = self._same(target)
        return Workers(max(1, sum(found.workers for found in same)), max((each.processes for each in same), default=1))

    def stable_workers(self) -> dict[str, Workers]:
        """Return the prediction workers of each model's stable version on all replicas."""
        if self.plans is None:
            return {}
        ready: Counter[tuple[str, str]] = Counter()
        processes: Counter[tuple[str, str]] = Counter()
        for replica, status, seen in self.seen():
            if seen.routable and not status.draining:
                version = (seen.model, seen.version)
                ready[version] += seen.predict.ready
                processes[version] = max(processes[version], replica.processes(*version))
        stable = {plan.model: (plan.model, plan.stable.version) for plan in self.plans.models}
        return {model: Workers(max(1, ready[version]), max(1, processes[version])) for model, version in stable.items()}

    def set_aside(self, target: Target, *, is_lost: bool) -> None:
        """Let a replica that did not answer get calls only where no other one is ready.

        One that `is_lost` could not be reached: it is set aside until a later status of its agent shows it well. One
        that refused a call is set aside for `AVOID_S`.
        """
        if is_lost:
            target.replica.lost_at = time.monotonic()
        else:
            target.replica.avoid_until = time.monotonic() + AVOID_S

    def choose_another(self, refused: Target) -> Target | None:
        """Return a target on another replica for a call that `refused` did not begin; None if there is none."""
        others = [target for target in self._same(refused) if target.replica is not refused.replica]
        return self._least_loaded(others) if others else None

    def choose_again(self, held: Target) -> Target:
        """Return the target with the least work for one more upstream batch of a call that holds `held`.

        If no replica takes calls to the version any more it is `held` itself, where the version is still loaded.
        """
        same = self._same(held)
        return self._least_loaded(same) if same else held

    def _same(self, target: Target) -> list[Target]:
        """Return the targets on all replicas with the target's version and entry."""
        return self._targets(target.model, target.version, lambda _contract: target.entry)

    def _choose_side(self, plan: traffic_plan.Plan, answering: EntryOf, caller: str) -> list[Target]:
        """Return the targets of the canary or of the stable version, by the canary's share."""
        canary = plan.canary
        if canary is not None and (canary_position(caller, canary) if caller else self._chance() * 100) < canary.share:
            targets = self._targets(plan.model, canary.version, answering)
            if targets:
                return targets
        return self._targets(plan.model, plan.stable.version, answering)

    def _least_loaded(self, targets: list[Target]) -> Target:
        """Return the target with the fewest of our calls in flight for each worker; those set aside come last."""
        if len(targets) == 1:
            return targets[0]
        now = time.monotonic()

        def rank(target: Target) -> tuple[bool, float, float]:
            load = target.replica.in_flight.total() / target.workers
            return target.replica.is_avoided(now), load, self._chance()

        return min(targets, key=rank)

    def _targets(self, model: str, version: str, answering: EntryOf) -> list[Target]:
        targets = []
        for replica, status, seen in self.seen():
            if (seen.model, seen.version) != (model, version) or not seen.routable or status.draining:
                continue
            entry = answering(seen.contract)
            if ready := (seen.predict if entry == "predict" else seen.explain).ready:
                url = status.torchserve.inference_url
                targets.append(Target(replica, url, model, version, ready, entry, seen.contract))
        return targets


def entry_of(kind: Kind, method: str | None = None) -> EntryOf:
    """Return the function from a version's contract to the entry that answers a call."""
    if kind == "predict":
        return lambda _contract: "predict"
    return partial(explaining_entry, method)


def canary_position(caller: str, canary: traffic_plan.Canary) -> float:
    """Return the caller's position in [0, 100), uniform over callers; below the canary's share it gets the canary.

    The position is the same in every process and for every share, so a growing share only adds callers. It depends on
    the version and the plan's salt, so that not every canary gets the same callers.
    """
    key = f"{canary.salt}\0{canary.version}\0{caller}".encode()
    # With 48 bits no rounding brings the quotient to 1.
    return int.from_bytes(blake2b(key, digest_size=6).digest(), "big") / 2**48 * 100
