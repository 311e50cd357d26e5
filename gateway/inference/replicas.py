"""What the agents see: each replica's status, polled in the background, so that no request and no probe waits for it.

A status counts only while the agent's own look at TorchServe is young: an agent that hangs, or one that answers but
cannot see TorchServe, is as good as none.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from contracts import report
from contracts import status as agent_status
from contracts.report import Report
from contracts.status import AgentStatus, StatusError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)
POLL_TIMEOUT_S = 1.0


@dataclass
class Replica:
    """One agent and the TorchServe behind it.

    `in_flight` counts by version what this process has given to that TorchServe and is not over: calls, also those that
    still wait for a place or whose caller has gone, and the rows of batches. `clock_ahead_s` is how far its clock is
    ahead of ours, as far as can be told: 0 where they may agree. `avoid_until` (monotonic): it has refused a call.
    `complaint` is why its last answer was no status.
    """

    url: str
    status: AgentStatus | None = None
    fresh_at: float = 0.0
    clock_ahead_s: float = 0.0
    avoid_until: float = 0.0
    complaint: str = ""
    in_flight: Counter[str] = field(default_factory=Counter, compare=False)
    poll: asyncio.Task[None] | None = field(default=None, compare=False)


class Agents:
    """The replicas' statuses; `poll_all` and `begin_polls` renew them and `current` gives those that count.

    Every poll reports to the agent, so that it unregisters no version that a gateway process still needs: the process's
    id, the plan's revision that it routes by, and what it has in flight by version.

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
        self._id = uuid.uuid4().hex
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

    async def poll_all(self, revision: int | None) -> None:
        """Renews every replica's status once; a failure leaves the old one to grow stale.

        `revision` is that of the plan by which calls are routed, None without one.
        """
        await asyncio.gather(*(self._poll(replica, revision) for replica in self.replicas))

    def begin_polls(self, revision: int | None) -> None:
        """Polls each replica whose last poll is over: an agent that hangs holds up neither the others nor the plan."""
        for replica in self.replicas:
            if replica.poll is None or replica.poll.done():
                replica.poll = asyncio.create_task(self._poll(replica, revision))

    async def close(self) -> None:
        """Ends the polls and closes the connections to the agents."""
        for replica in self.replicas:
            if replica.poll is not None:
                replica.poll.cancel()
        await self._client.aclose()

    def _report(self, replica: Replica, revision: int | None) -> str:
        in_flight = {version: count for version, count in replica.in_flight.items() if count}
        return report.dump(Report(self._id, revision, in_flight))

    async def _ask(self, url: str, headers: dict[str, str]) -> AgentStatus:
        """Return the status of the agent at `url`.

        Raises:
            httpx.HTTPError: it does not answer.
            StatusError: it answers something else.
        """
        content = b""
        async with self._client.stream("GET", f"{url}/status", headers=headers) as response:
            response.raise_for_status()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > agent_status.MAX_BYTES:
                    break
        return agent_status.parse(content)

    async def _poll(self, replica: Replica, revision: int | None) -> None:
        asked_at, asked_wall = self._clock(), self._wall()
        try:
            status = await self._ask(replica.url, {report.HEADER: self._report(replica, revision)})
        except httpx.HTTPError as error:
            logger.debug("agent %s gave no status: %s", replica.url, type(error).__name__)
            return
        except StatusError as error:
            if str(error) != replica.complaint:  # once, not at each poll
                logger.warning("agent %s gave no status: %s", replica.url, error)
            replica.complaint = str(error)
            return
        replica.complaint = ""
        now = self._wall()
        if status.told_at is not None:
            # The agent's clock may be another machine's. It was read between our question and its answer, so what it is
            # ahead lies between these two; what is known of that changes only as far as they force it to.
            least, most = status.told_at - now, status.told_at - asked_wall
            replica.clock_ahead_s = min(max(replica.clock_ahead_s, least), most)
            now = status.told_at
        # What counts is that its look moved on between two polls. Only the first status has none before it.
        if replica.status is None:
            is_fresh = abs(now - status.observed_at) <= self._max_age_s
        else:
            is_fresh = status.observed_at != replica.status.observed_at
        replica.status = status
        if is_fresh:
            replica.fresh_at = asked_at
