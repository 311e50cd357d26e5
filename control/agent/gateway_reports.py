"""What each gateway process says with its polls of the status page: the plan it routes by, its calls in flight here.

TorchServe tells nobody what its workers have in hand, so the gateways' word is the only proof that a version can be
unregistered without losing a request. The header is untrusted: what is not exactly of its form is not listened to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contracts.plan import VERSION

_MAX_HEADER_CHARS = 4096
# Far more processes than poll one agent; more than these would be somebody who makes ids up.
_MAX_GATEWAYS = 256
_Count = Annotated[int, Field(ge=0, le=1_000_000)]
_Version = Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]


class Report(BaseModel):
    """One gateway process: the plan's revision it routes by (None: no plan, so it routes nothing), its calls in flight.

    `in_flight` counts by version, and only what this agent's TorchServe was asked.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    revision: _Count | None
    in_flight: Annotated[dict[_Version, _Count], Field(max_length=64)]


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
        """Remembers the report in a poll's header; False for a header that is none."""
        report = parse_report(header)
        if report is None:
            return False
        known = self._heard.get(report.id)
        if known is None and len(self._heard) >= _MAX_GATEWAYS:
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

    def status(self, now: float) -> list[dict[str, Any]]:
        """Each process with what it said last and how many seconds ago."""
        return [
            {
                "id": name,
                "revision": heard.report.revision,
                "in_flight": heard.report.in_flight,
                "heard_s": round(now - heard.at, 1),
            }
            for name, heard in sorted(self._heard.items())
        ]


def parse_report(header: str) -> Report | None:
    """The report in the header; None for anything else than a small, exact one."""
    if len(header) > _MAX_HEADER_CHARS:
        return None
    try:
        return Report.model_validate_json(header)
    except ValidationError:
        return None
