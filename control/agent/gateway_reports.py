"""The reports of gateway processes: the plan that each routes by, and its requests in flight on this TorchServe.

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
class _LastReport:
    report: Report
    at: float
    before: float
    """Time of the report before, -inf if none. The process knew our answer to that one when it made this report."""


class GatewayReports:
    """The last report of each gateway process. Times are of the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._last: dict[str, _LastReport] = {}

    def record(self, header: str, now: float) -> bool:
        """Record the report in a poll's header; return False if the header is no report."""
        try:
            report = gateway_report.parse(header)
        except ReportError:
            return False
        known = self._last.get(report.id)
        if known is None and len(self._last) >= MAX_GATEWAYS:
            return False
        self._last[report.id] = _LastReport(report, now, known.at if known else float("-inf"))
        return True

    def drop_silent(self, now: float, gone_after_s: float) -> None:
        """Drop the processes that have not reported for `gone_after_s`: none of their requests is still under way."""
        self._last = {name: last for name, last in self._last.items() if now - last.at <= gone_after_s}

    def __bool__(self) -> bool:
        """Return True if any process has reported."""
        return bool(self._last)

    def blocker(self, version: tuple[str, str] | None, *, since: float, revision: int | None = None) -> str | None:
        """Return a process that may still send to `version`, with the reason; None if none can.

        Args:
            version: model and version; None for any.
            since: time since which it has not been routable.
            revision: the plan's, which the process must route by; None for any.

        A process is released if it has read our answer after `since`, and then reports no request in flight to the
        version and, with `revision`, that it routes by that revision of the plan.
        """
        for name, last in self._last.items():
            report = last.report
            in_flight = sum(report.in_flight.values()) if version is None else report.calls_to(*version)
            if last.before <= since:
                return f"gateway {name} has not read the status yet"
            if in_flight:
                return f"gateway {name} has {in_flight} requests in flight"
            if revision is not None and last.report.revision not in {None, revision}:
                return f"gateway {name} routes by plan revision {last.report.revision}"
        return None

    def status(self, now: float) -> tuple[GatewayStatus, ...]:
        """Return each process's last report with its age in seconds."""
        return tuple(GatewayStatus(last.report, round(now - last.at, 1)) for _, last in sorted(self._last.items()))
