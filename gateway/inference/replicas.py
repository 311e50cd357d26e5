"""Each replica's status, polled from its agent in the background, so that no request and no probe waits for it.

A status counts only while the agent's last observation of TorchServe is recent. So an agent that hangs, or that cannot
reach TorchServe, counts as missing.
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

    `in_flight` counts by version the calls and upstream batches that this process has in flight there; among them are
    calls that still wait for a place, and calls whose caller disconnected. `clock_ahead_s` estimates the seconds that
    its clock is ahead of ours; it is 0 while the clocks may agree. `avoid_until` (monotonic time) is set when it
    refuses a call. `complaint` is the reason why the agent's last answer was no status.
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
    """The replicas' statuses; `poll_all` and `begin_polls` renew them, `current` returns those that count.

    Every poll carries a report to the agent: the gateway process's id, the revision of the plan that it routes by, and
    its calls in flight by version. The agent does not unregister a version that a gateway process still needs.

    `clock` returns monotonic seconds, `wall` Unix time; tests pass in both.
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
        """Return each replica whose status is recent enough, with that status."""
        oldest = self._clock() - self._max_age_s
        return [
            (replica, replica.status)
            for replica in self.replicas
            if replica.status is not None and replica.fresh_at >= oldest
        ]

    async def poll_all(self, revision: int | None) -> None:
        """Renew every replica's status once; after a failed poll the old status stays until it is too old.

        `revision` is that of the plan in force, None without a plan.
        """
        await asyncio.gather(*(self._poll(replica, revision) for replica in self.replicas))

    def begin_polls(self, revision: int | None) -> None:
        """Start a poll of each replica whose last poll has ended, and do not wait: an agent may hang."""
        for replica in self.replicas:
            if replica.poll is None or replica.poll.done():
                replica.poll = asyncio.create_task(self._poll(replica, revision))

    async def close(self) -> None:
        """Cancel the polls and close the connections to the agents."""
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
            httpx.HTTPError: the agent does not answer.
            StatusError: the answer is no status.
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
            # The agent may run on another machine. It read its clock between our request and its answer, so the time
            # that its clock is ahead lies between these two bounds; the estimate changes only to stay inside them.
            least, most = status.told_at - now, status.told_at - asked_wall
            replica.clock_ahead_s = min(max(replica.clock_ahead_s, least), most)
            now = status.told_at
        # A status is fresh if the agent has observed TorchServe since the last poll. The first status has no
        # predecessor, so its age by the clocks decides.
        if replica.status is None:
            is_fresh = abs(now - status.observed_at) <= self._max_age_s
        else:
            is_fresh = status.observed_at != replica.status.observed_at
        replica.status = status
        if is_fresh:
            replica.fresh_at = asked_at
