"""What the agents see: each replica's status, polled in the background, so that no request and no probe waits for it.

A status counts only while the agent's own look at TorchServe is young: an agent that hangs, or one that answers but
cannot see TorchServe, is as good as none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)
POLL_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Pool:
    """Workers of one TorchServe entry, `ready` of `wanted`; queued rows, `pending` of `capacity` (None: unseen)."""

    ready: int = 0
    wanted: int = 0
    pending: int | None = None
    capacity: int | None = None


@dataclass(frozen=True)
class VersionStatus:
    """One version on one replica, as its agent reports it."""

    model: str
    version: str
    role: str
    state: str
    routable: bool
    predict: Pool
    explain: Pool
    reason: str | None
    contract: dict[str, Any]


@dataclass(frozen=True)
class AgentStatus:
    """One agent's whole report."""

    observed_at: float
    draining: bool
    engine_state: str
    engine_restarts: int
    inference_url: str
    versions: tuple[VersionStatus, ...]


@dataclass
class Replica:
    """One agent and the TorchServe behind it; `in_flight` counts this process's own calls to that TorchServe."""

    url: str
    status: AgentStatus | None = None
    fresh_at: float = 0.0
    in_flight: int = field(default=0, compare=False)


def parse_status(data: Any) -> AgentStatus:  # noqa: ANN401 — parsed JSON
    """The report that `data` (parsed JSON) holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no report.
    """
    engine = data["torchserve"]
    return AgentStatus(
        observed_at=float(data["observed_at"]),
        draining=bool(data["draining"]),
        engine_state=str(engine["state"]),
        engine_restarts=int(engine["restarts"]),
        inference_url=str(engine["inference_url"]).rstrip("/"),
        versions=tuple(_parse_version(item) for item in data["versions"]),
    )


def _parse_version(item: dict[str, Any]) -> VersionStatus:
    return VersionStatus(
        model=str(item["model"]),
        version=str(item["version"]),
        role=str(item["role"]),
        state=str(item["state"]),
        routable=bool(item["routable"]),
        predict=_parse_pool(item["predict"]),
        explain=_parse_pool(item["explain"]),
        reason=item.get("reason"),
        contract=dict(item.get("contract") or {}),
    )


def _parse_pool(item: dict[str, Any]) -> Pool:
    return Pool(int(item["ready"]), int(item["wanted"]), item.get("pending"), item.get("capacity"))


class Agents:
    """The replicas' statuses; `poll_all` renews them and `current` gives those that count.

    `clock` is monotonic seconds, `wall` Unix time; both are passed in by tests.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        *,
        max_age_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.replicas = tuple(Replica(url) for url in urls)
        self._max_age_s = max_age_s
        self._client = httpx.AsyncClient(transport=transport, timeout=POLL_TIMEOUT_S, trust_env=False)
        self._clock = clock
        self._wall = wall

    def current(self) -> list[tuple[Replica, AgentStatus]]:
        """Each replica whose status is young enough, with that status."""
        oldest = self._clock() - self._max_age_s
        return [
            (replica, replica.status)
            for replica in self.replicas
            if replica.status is not None and replica.fresh_at >= oldest
        ]

    async def poll_all(self) -> None:
        """Renews every replica's status once; a failure leaves the old one to grow stale."""
        await asyncio.gather(*(self._poll(replica) for replica in self.replicas))

    async def close(self) -> None:
        """Closes the connections to the agents."""
        await self._client.aclose()

    async def _poll(self, replica: Replica) -> None:
        asked_at = self._clock()
        try:
            response = await self._client.get(f"{replica.url}/status")
            response.raise_for_status()
            status = parse_status(orjson.loads(response.content))
        except (httpx.HTTPError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.debug("agent %s gave no status: %s", replica.url, type(error).__name__)
            return
        # The agent's clock may be another machine's: what counts is that its look moved on between two polls. Only the
        # first status, which has none before it, is compared with our own clock.
        if replica.status is None:
            is_fresh = abs(self._wall() - status.observed_at) <= self._max_age_s
        else:
            is_fresh = status.observed_at != replica.status.observed_at
        replica.status = status
        if is_fresh:
            replica.fresh_at = asked_at
