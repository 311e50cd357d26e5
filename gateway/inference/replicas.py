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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import httpx

from contracts import report
from contracts import status as agent_status
from contracts.report import Report
from contracts.status import AgentStatus, StatusError
from gateway.inference.discovery import RESOLVE_EVERY_S
from gateway.inference.transport import PooledTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.inference.discovery import Discovery

logger = logging.getLogger(__name__)
POLL_TIMEOUT_S = 1.0
# A replica whose agent has not answered a poll for so long is set aside: a host that is cut off refuses no connection.
SILENT_S = 0.45  # less than `GATEWAY_POLL_S`, so that the next tick notices


@dataclass
class Replica:
    """One agent and the TorchServe behind it.

    `in_flight` counts by version the calls and upstream batches that this process has in flight there; among them are
    calls that still wait for a place, and calls whose caller disconnected. `held` counts the calls of many images: each
    of their upstream batches finds its own replica, and the version must stay loaded here until the last is answered.
    `sharers` counts by version the other gateway processes that have calls in flight there, as the agent last told.

    `avoid_until` (monotonic time) is set when it refuses a call; `lost_at` is set when it, or its agent, cannot be
    reached, and counts until a later poll shows it well. `asked_at` is when the last poll began.

    `clock_ahead_s` estimates the seconds that its clock is ahead of ours; it is 0 while the clocks may agree.
    `is_gone`: it is no longer listed, gets no more calls, and is forgotten once it has none in flight. `complaint` is
    the reason why the agent's last answer was no status. `name` is the host name that it was found by.
    """

    url: str
    name: str = ""
    status: AgentStatus | None = None
    fresh_at: float = 0.0
    clock_ahead_s: float = 0.0
    avoid_until: float = 0.0
    lost_at: float = -1.0
    asked_at: float = 0.0
    is_gone: bool = False
    complaint: str = ""
    in_flight: Counter[str] = field(default_factory=Counter, compare=False)
    held: Counter[str] = field(default_factory=Counter, compare=False)
    sharers: Counter[str] = field(default_factory=Counter, compare=False)
    poll: asyncio.Task[None] | None = field(default=None, compare=False)

    def is_avoided(self, now: float) -> bool:
        """Return True if it gets calls only where no other replica is ready; `now` is monotonic time."""
        return self.avoid_until > now or self.lost_at >= self.fresh_at

    def calls(self) -> Counter[str]:
        """Return by version the calls that need it here."""
        return self.in_flight + self.held

    def processes(self, model: str, version: str) -> int:
        """Return the gateway processes that have calls to the version in flight here, this one included."""
        return 1 + self.sharers[report.counter(model, version)] + self.sharers[version]  # see `Report.in_flight`


class Agents:
    """The replicas that are listed, and their statuses.

    `poll_all` and `begin_polls` renew the list and the statuses, `current` returns the statuses that count.

    Every poll carries a report to the agent: the gateway process's id, the revision of the plan that it routes by, and
    its calls in flight by version. The agent does not unregister a version that a gateway process still needs.

    `clock` returns monotonic seconds, `wall` Unix time; tests pass in both.
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        max_age_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._discovery = discovery
        self._replicas: dict[str, Replica] = {}
        self._finding: asyncio.Task[None] | None = None
        self._find_at = 0.0
        self._id = uuid.uuid4().hex
        self._max_age_s = max_age_s
        # httpx's own pool keeps 20 connections, so that most of 100 replicas would get a new one for each poll; without
        # this limit it looks at all pairs of connections for each request.
        mounts = {"http://": PooledTransport()} if transport is None else None
        self._client = httpx.AsyncClient(transport=transport, mounts=mounts, timeout=POLL_TIMEOUT_S, trust_env=False)
        self._clock = clock
        self._wall = wall

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The replicas that are listed now."""
        return tuple(replica for replica in self._replicas.values() if not replica.is_gone)

    def current(self) -> list[tuple[Replica, AgentStatus]]:
        """Return each replica whose status is recent enough, with that status."""
        oldest = self._clock() - self._max_age_s
        return [
            (replica, replica.status)
            for replica in self.replicas
            if replica.status is not None and replica.fresh_at >= oldest
        ]

    async def poll_all(self, revision: int | None) -> None:
        """Find the replicas and renew each one's status; after a failed poll the old status stays until it is too old.

        `revision` is that of the plan in force, None without a plan.
        """
        await self._find()
        await asyncio.gather(*(self._poll(replica, revision) for replica in self._replicas.values()))

    def begin_polls(self, revision: int | None) -> None:
        """Start a poll of each replica whose last poll has ended, and do not wait: an agent may hang.

        A replica that is gone is polled until it has no call in flight: its agent waits for that before it stops.
        """
        is_due = self._clock() >= self._find_at or self._discovery.has_changed
        if is_due and (self._finding is None or self._finding.done()):
            self._finding = asyncio.create_task(self._find())
        for url, replica in list(self._replicas.items()):
            if replica.is_gone and not replica.calls():
                del self._replicas[url]
            elif replica.poll is None or replica.poll.done():
                replica.poll = asyncio.create_task(self._poll(replica, revision))
            elif self._clock() - replica.asked_at >= SILENT_S:
                replica.lost_at = self._clock()

    async def close(self) -> None:
        """Cancel the polls and close the connections to the agents."""
        for task in (self._finding, *(replica.poll for replica in self._replicas.values())):
            if task is not None:
                task.cancel()
        self._discovery.close()
        await self._client.aclose()

    async def _find(self) -> None:
        """Renew the list of replicas."""
        self._find_at = self._clock() + RESOLVE_EVERY_S
        listed = {address.url: address for address in await self._discovery.find()}
        for url, replica in self._replicas.items():
            replica.is_gone = url not in listed
        for url, address in listed.items():
            self._replicas.setdefault(url, Replica(url, address.name))

    def _report(self, replica: Replica, revision: int | None) -> str:
        return report.dump(Report(self._id, revision, dict(replica.calls())))

    def _sharers(self, status: AgentStatus) -> Counter[str]:
        others = (gateway.report for gateway in status.gateways if gateway.report.id != self._id)
        return Counter(version for other in others for version, count in other.in_flight.items() if count)

    async def _ask(self, url: str, headers: dict[str, str]) -> AgentStatus:
        """Return the status of the agent at `url`.

        Raises:
            httpx.HTTPError, TimeoutError: the agent does not answer.
            StatusError: the answer is no status.
        """
        content = b""
        async with (
            asyncio.timeout(POLL_TIMEOUT_S),
            self._client.stream("GET", f"{url}/status", headers=headers) as response,
        ):
            response.raise_for_status()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > agent_status.MAX_BYTES:
                    break
        return agent_status.parse(content)

    async def _poll(self, replica: Replica, revision: int | None) -> None:
        asked_at, asked_wall = self._clock(), self._wall()
        replica.asked_at = asked_at
        try:
            status = await self._ask(replica.url, {report.HEADER: self._report(replica, revision)})
        except (httpx.HTTPError, TimeoutError) as error:
            logger.debug("agent %s gave no status: %s", replica.url, type(error).__name__)
            replica.lost_at = asked_at
            return
        except StatusError as error:
            if str(error) != replica.complaint:  # once, not at each poll
                logger.warning("agent %s gave no status: %s", replica.url, error)
            replica.complaint = str(error)
            return
        replica.complaint = ""
        replica.sharers = self._sharers(status)
        status = at_address(status, replica)
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


def at_address(status: AgentStatus, replica: Replica) -> AgentStatus:
    """Return the status with TorchServe's URL at the replica's own address, where it names the replicas' common name.

    The agents behind one name may all report this name, but each must get its own calls.
    """
    url = httpx.URL(status.torchserve.inference_url)
    if not replica.name or url.host != replica.name:
        return status
    own = str(url.copy_with(host=httpx.URL(replica.url).host))
    return replace(status, torchserve=replace(status.torchserve, inference_url=own))
