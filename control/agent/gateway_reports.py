"""The gateway processes that report with their polls: which plan each routes by, and what each has in flight here.

The reports (contracts/report.py) decide when a version can be unregistered without losing a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts import report as gateway_report
from contracts.report import ReportError
from contracts.status import MAX_GATEWAYS, GatewayStatus

if TYPE_CHECKING:
    from contracts.report import Report


@dataclass(frozen=True)
class _Heard:
    report: Report
    at: float
    before: float
    """When it was heard the time before; -inf: never. What we answered then, it knew when it made this report."""


class Gateways:
    """The last report of each gateway process. Times are of the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    def take(self, header: str, now: float) -> bool:
        """Remember the report in a poll's header; return False for a header that is none."""
        try:
            report = gateway_report.parse(header)
        except ReportError:
            return False
        known = self._heard.get(report.id)
        if known is None and len(self._heard) >= MAX_GATEWAYS:
            return False
        self._heard[report.id] = _Heard(report, now, known.at if known else float("-inf"))
        return True

    def forget(self, now: float, gone_after_s: float) -> None:
        """Forgets the processes that have been silent for so long that none of their calls can still be under way."""
        self._heard = {name: heard for name, heard in self._heard.items() if now - heard.at <= gone_after_s}

    def __bool__(self) -> bool:
        """Whether any process is remembered."""
        return bool(self._heard)

    def hold(self, version: str | None, *, since: float, revision: int | None = None) -> str | None:
        """Which process may still ask for `version` (None: anything), and why; None when none can.

        A process lets go when it has heard our answer after `since`, when `version` was no longer offered, and then
        reports none in flight to it and, with `revision`, that it routes by that plan.
        """
        for name, heard in self._heard.items():
            counts = heard.report.in_flight
            in_flight = sum(counts.values()) if version is None else counts.get(version, 0)
            if heard.before <= since:
                return f"gateway {name} has not been told yet"
            if in_flight:
                return f"gateway {name} has {in_flight} calls in flight"
            if revision is not None and heard.report.revision not in {None, revision}:
                return f"gateway {name} routes by plan revision {heard.report.revision}"
        return None

    def status(self, now: float) -> tuple[GatewayStatus, ...]:
        """Return each process with what it said last and how many seconds ago."""
        return tuple(GatewayStatus(heard.report, round(now - heard.at, 1)) for _, heard in sorted(self._heard.items()))
