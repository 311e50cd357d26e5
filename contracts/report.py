"""A gateway process's report to an agent, in a header of each poll of its status.

TorchServe does not report what its workers work on, so only the gateways' reports prove that a version can be
unregistered without losing a request. The header is untrusted: a text that is not exactly a report is refused. Its
format has no schema: agents of every release read this one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial

from contracts.fields import DocumentError, Fields, read_json
from contracts.names import NAME, VERSION

HEADER = "x-gradserve-gateway"
MAX_CHARS = 4096
MAX_VERSIONS = 64
MAX_COUNT = 1_000_000
_COUNTED = re.compile(f"(?:{NAME.pattern}/)?{VERSION.pattern}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ReportError(DocumentError):
    """A header that is no report."""

    document = "gateway report"
    remedy = "run gateway and agent of the same release"


@dataclass(frozen=True)
class Report:
    """One gateway process, named by `id`.

    `revision` is that of the plan it routes by; None: it has no plan, so it routes nothing. `in_flight` counts the
    calls that it has given to this agent's TorchServe and that are not over, by `MODEL/VERSION`. Gateways of before
    schema 3 of the plan count them by version alone. These counts stand for every model: a version may stay loaded for
    longer than it is needed, until that gateway is updated, and never for less.
    """

    id: str
    revision: int | None
    in_flight: dict[str, int]

    def calls_to(self, model: str, version: str) -> int:
        """Return the calls in flight to a version of a model."""
        return self.in_flight.get(counter(model, version), 0) + self.in_flight.get(version, 0)


def counter(model: str, version: str) -> str:
    """Return the name under which the calls to a version of a model are counted."""
    return f"{model}/{version}"


def dump(report: Report) -> str:
    """Return the report as the header's value, compact ASCII JSON."""
    data = {"id": report.id, "revision": report.revision, "in_flight": report.in_flight}
    return json.dumps(data, separators=(",", ":"))


def parse(header: str) -> Report:
    """Return the report in a header.

    Raises:
        ReportError: it holds none: it is too long, no JSON, or has a field that is missing, unknown or impossible.
    """
    return read(Fields(read_json(header, ReportError, most_bytes=MAX_CHARS), "", ReportError))


def read(fields: Fields, *, is_whole: bool = True) -> Report:
    """Return the report in these fields; unless it `is_whole`, they may hold more than a report.

    Raises:
        DocumentError: a field is missing or impossible, or unknown.
    """
    report = Report(
        id=fields.text("id", pattern=_ID),
        revision=fields.nullable("revision", partial(fields.integer, most=MAX_COUNT)),
        in_flight=fields.counts("in_flight", pattern=_COUNTED, most=MAX_COUNT, most_items=MAX_VERSIONS),
    )
    if is_whole:
        fields.end()
    return report
