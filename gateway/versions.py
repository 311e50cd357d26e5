"""Which version on which replica answers a call: the plan says who should, the agents' statuses say who can."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gateway import traffic
from gateway.errors import Unavailable
from gateway.refusals import VersionUnknown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.agents import Agents, AgentStatus, Replica, VersionStatus

logger = logging.getLogger(__name__)
Kind = Literal["predict", "explain"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where one call goes: a version of a model on one replica's TorchServe, and the ready workers it has there."""

    replica: Replica
    inference_url: str
    model: str
    version: str
    workers: int


class Versions:
    """The versions that are served. The plan's file is re-read when it changes; a broken one leaves the last plan."""

    def __init__(self, plan_path: Path, agents: Agents, *, chance: Callable[[], float] = random.random) -> None:
        self.plan: traffic.Plan | None = None
        self.plan_error: str | None = None
        self._plan_path = plan_path
        self._plan_seen: tuple[int, int, int] | None = None
        self._agents = agents
        self._chance = chance

    def refresh_plan(self) -> None:
        """Reads the plan's file if it is another than the one read last."""
        try:
            stat = self._plan_path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen == self._plan_seen:
                return
            self.plan = traffic.load(self._plan_path)
            self.plan_error = None
        except FileNotFoundError:
            seen = None
            self.plan_error = "there is no traffic plan"
        except (OSError, traffic.PlanError) as error:
            self.plan_error = str(error) if isinstance(error, traffic.PlanError) else "the plan cannot be read"
            logger.error("traffic plan not taken: %s", self.plan_error)  # noqa: TRY400 — the sentence says it all
        self._plan_seen = seen

    def seen(self) -> list[tuple[Replica, AgentStatus, VersionStatus]]:
        """Every version that a young status names, replica by replica."""
        return [
            (replica, status, version)
            for replica, status in self._agents.current()
            for version in status.versions
            if self.plan is None or version.model == self.plan.model
        ]

    def is_ready(self) -> bool:
        """Whether at least one replica that is not draining has a verified READY worker of the stable version."""
        return self.plan is not None and bool(self._targets(self.plan.stable.version, "predict"))

    def contract(self, version: str) -> dict[str, Any] | None:
        """The contract of `version` as an agent reports it."""
        return next((seen.contract for _, _, seen in self.seen() if seen.version == version and seen.contract), None)

    def choose(self, kind: Kind, version: str | None) -> Target:
        """The replica with the fewest of our calls that can answer for `version`, or for the one whose turn it is.

        Raises:
            VersionUnknown: neither the plan nor any replica has `version`.
            Unavailable: it should be there, but no verified worker is.
        """
        plan = self.plan
        if plan is None:
            raise Unavailable("not_ready")
        if version is None:
            targets = self._turn(plan, kind)
        else:
            targets = self._targets(version, kind)
            if not targets and not self._is_known(plan, version):
                raise VersionUnknown(version)
        if not targets:
            raise Unavailable("not_ready")
        return min(targets, key=lambda target: target.replica.in_flight)

    def _turn(self, plan: traffic.Plan, kind: Kind) -> list[Target]:
        if plan.canary is not None and self._chance() * 100 < plan.canary.share:
            targets = self._targets(plan.canary.version, kind)
            if targets:
                return targets
        return self._targets(plan.stable.version, kind)

    def _targets(self, version: str, kind: Kind) -> list[Target]:
        targets = []
        for replica, status, seen in self.seen():
            ready = seen.predict.ready if kind == "predict" else seen.explain.ready
            if seen.version == version and seen.routable and ready and not status.draining:
                targets.append(Target(replica, status.inference_url, seen.model, seen.version, ready))
        return targets

    def _is_known(self, plan: traffic.Plan, version: str) -> bool:
        planned = any(release.version == version for release in plan.releases())
        return planned or any(seen.version == version for _, _, seen in self.seen())
