"""What the gateway notes about one request while it answers: for its log line, its metrics and its Server-Timing."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from contracts.wire import Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

# Long enough for a W3C trace id or a UUID with a prefix; no character that could break a log line or a header.
SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# The route of a request that no route takes: a caller's own path would be a label without bound.
UNMATCHED = "unmatched"


class Quota(NamedTuple):
    """One quota that the request was counted against: `remaining` of `amount` calls are left for `left_s` seconds.

    `kind` is what it belongs to, `key` or `address`; its windows are `window_s` seconds long.
    """

    kind: str
    amount: int
    window_s: int
    remaining: int
    left_s: int


class RequestContext:
    """One request's notes; `stages` are seconds spent, in the order in which they ended."""

    __slots__ = (
        "body_bytes",
        "caller",
        "client",
        "code",
        "entries",
        "is_hurried",
        "key",
        "model",
        "quotas",
        "request_id",
        "route",
        "row",
        "stages",
        "started",
        "status",
        "traceparent",
        "version",
    )

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.route = UNMATCHED
        self.started = time.perf_counter()
        self.stages: dict[str, float] = {}
        self.body_bytes = 0
        self.status = 0
        self.code = ""
        self.model = ""
        self.version = ""
        self.caller = ""
        self.client = ""  # whom its places count for: the key's name, else the address
        self.key = ""  # which of the caller's keys, by its id
        self.quotas: tuple[Quota, ...] = ()
        self.entries: Sequence[dict[str, Any]] = ()  # a prediction's, for the metrics
        self.is_hurried = False  # the caller left the version little time: that none is left is not its fault
        self.traceparent = ""
        self.row = ""  # the request id under which its image travelled, if it is another's

    def stage(self, name: str) -> Stage:
        """A context that adds the time spent inside to the stage `name`."""
        return Stage(self.stages, name)

    def carried(self) -> Options:
        """Return what names the request on its way to the model."""
        return Options(self.request_id, traceparent=self.traceparent or None)

    def elapsed_s(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.started

    def server_timing(self) -> str:
        """The stages so far as a Server-Timing header's value, in ms."""
        stages = {**self.stages, "total": self.elapsed_s()}
        return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())

    def rate_limits(self) -> tuple[str, str]:
        """The values of the headers RateLimit-Policy and RateLimit, which list each quota.

        Source: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/11/
        """
        return (
            ", ".join(f'"{quota.kind}";q={quota.amount};w={quota.window_s}' for quota in self.quotas),
            ", ".join(f'"{quota.kind}";r={quota.remaining};t={quota.left_s}' for quota in self.quotas),
        )


class Stage:
    """Times one stage; a generator's context costs several times as much, and each request has three."""

    __slots__ = ("_name", "_stages", "_started")

    def __init__(self, stages: dict[str, float], name: str) -> None:
        self._stages = stages
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._stages[self._name] = self._stages.get(self._name, 0.0) + time.perf_counter() - self._started


def request_id_of(scope: Scope) -> str:
    """The caller's own x-request-id where it is sane, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return new_request_id()


def new_request_id() -> str:
    """As random as a UUID, in a tenth of its time."""
    return os.urandom(16).hex()


def context_of(scope: Scope) -> RequestContext:
    """The notes that the envelope began for this request."""
    context: RequestContext = scope["gradserve"]
    return context
