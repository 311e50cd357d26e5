"""Which version on which replica answers a call: the plan says who should, the agents' statuses say who can."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, Self

from contracts import plan as traffic_plan
from contracts.watched_file import WatchedFile
from gateway.errors import Unavailable
from gateway.refusals import VersionUnknown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from contracts.status import AgentStatus, VersionStatus
    from gateway.inference.replicas import Agents, Replica

logger = logging.getLogger(__name__)
AVOID_S = 1.0
Kind = Literal["predict", "explain"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where one call goes: a version of a model on one replica's TorchServe, and the ready workers it has there.

    While the call is on, from the choice to the last answer, the target is entered as a context; so the agent learns
    when nothing needs a version any more.
    """

    replica: Replica
    inference_url: str
    model: str
    version: str
    workers: int

    def __enter__(self) -> Self:
        self.replica.in_flight[self.version] += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self.replica.in_flight[self.version] -= 1


class Router:
    """The versions that are served. The plan's file is re-read when it changes; a broken one leaves the last plan."""

    def __init__(self, plan_path: Path, agents: Agents, *, chance: Callable[[], float] = random.random) -> None:
        self._plan_file = WatchedFile(plan_path, traffic_plan.load, missing="there is no traffic plan")
        self._agents = agents
        self._chance = chance

    @property
    def plan(self) -> traffic_plan.Plan | None:
        """The plan in force; None while there was none that could be used."""
        return self._plan_file.content

    @property
    def plan_error(self) -> str | None:
        """What is wrong with the plan's file as it is now; None when nothing is."""
        return self._plan_file.error

    @property
    def revision(self) -> int | None:
        """The revision of the plan in force."""
        return self.plan.revision if self.plan is not None else None

    def refresh_plan(self) -> None:
        """Read the plan's file if it has changed; log once what is wrong with it."""
        if self._plan_file.refresh() and self.plan_error is not None:
            logger.error("traffic plan not taken: %s", self.plan_error, extra={"revision_in_force": self.revision})

    def seen(self) -> list[tuple[Replica, AgentStatus, VersionStatus]]:
        """Every version that a young status names, replica by replica."""
        return [
            (replica, status, version)
            for replica, status in self._agents.current()
            for version in status.versions
            if self.plan is None or version.model == self.plan.model
        ]

    def is_ready(self) -> bool:
        """Return True if replicas that are not draining have verified READY workers of the stable version.

        Both kinds count, as /readyz speaks for /predict and /explain.
        """
        if self.plan is None:
            return False
        version = self.plan.stable.version
        return bool(self._targets(version, "predict")) and bool(self._targets(version, "explain"))

    def choose(self, kind: Kind, version: str | None, caller: str = "") -> Target:
        """The replica with the fewest of our calls that can answer for `version`, or for the one whose turn it is.

        Raises:
            VersionUnknown: `version` is not in the plan; what is only still loaded may be gone at any moment.
            Unavailable: it should be there, but no verified worker is.
        """
        plan = self.plan
        if plan is None:
            raise Unavailable("not_ready")
        if version is None:
            targets = self._turn(plan, kind, caller)
        elif any(release.version == version for release in plan.releases()):
            targets = self._targets(version, kind)
        else:
            raise VersionUnknown(version)
        if not targets:
            raise Unavailable("not_ready")
        return least_loaded(targets)

    def workers(self, kind: Kind, version: str) -> int:
        """Return the ready workers of a version on all replicas, at least one."""
        return max(1, sum(target.workers for target in self._targets(version, kind)))

    def choose_another(self, kind: Kind, refused: Target) -> Target | None:
        """Return where a call goes that `refused` did not begin: the same version on another replica, if there is one.

        For a moment the replica that refused it gets calls only if it is the only one.
        """
        refused.replica.avoid_until = time.monotonic() + AVOID_S
        others = [target for target in self._targets(refused.version, kind) if target.replica is not refused.replica]
        return least_loaded(others) if others else None

    def _turn(self, plan: traffic_plan.Plan, kind: Kind, caller: str) -> list[Target]:
        canary = plan.canary
        if canary is not None and (place_of(caller, canary) if caller else self._chance() * 100) < canary.share:
            targets = self._targets(canary.version, kind)
            if targets:
                return targets
        return self._targets(plan.stable.version, kind)

    def _targets(self, version: str, kind: Kind) -> list[Target]:
        targets = []
        for replica, status, seen in self.seen():
            ready = seen.predict.ready if kind == "predict" else seen.explain.ready
            if seen.version == version and seen.routable and ready and not status.draining:
                targets.append(Target(replica, status.torchserve.inference_url, seen.model, seen.version, ready))
        return targets


def least_loaded(targets: list[Target]) -> Target:
    """Return the target whose replica has the fewest of our calls, among those that refused none just now."""
    if len(targets) == 1:
        return targets[0]
    now = time.monotonic()
    return min(targets, key=lambda target: (target.replica.avoid_until > now, target.replica.in_flight.total()))


def place_of(caller: str, canary: traffic_plan.Canary) -> float:
    """The caller's place among all callers, uniform in [0, 100): below the canary's share is the canary's side.

    It is the same in every process and for every share, so a growing share only adds callers; the version and the
    plan's salt are in it, so that not every canary is tried on the same ones.
    """
    named = f"{canary.salt}\0{canary.version}\0{caller}".encode()
    # 48 bits: few enough that no rounding brings the quotient to 1.
    return int.from_bytes(blake2b(named, digest_size=6).digest(), "big") / 2**48 * 100
