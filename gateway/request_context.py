"""The request context: facts about one request for its log line, its metrics and its Server-Timing header."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from contracts.wire import Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

# Long enough for a W3C trace id or a UUID with a prefix, without a character that could break a log line or a header.
SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# The route label of a request that no route matches. The path itself would be a label without bound.
UNMATCHED = "unmatched"


class Quota(NamedTuple):
    """A quota that the request was counted against: `remaining` of `amount` calls are left for `left_s` seconds.

    `kind` is `key` or `address`; a window is `window_s` seconds long.
    """

    kind: str
    amount: int
    window_s: int
    remaining: int
    left_s: int


class RequestContext:
    """The facts about one request; `stages` has the seconds spent in each stage, in the order in which they ended."""

    __slots__ = (
        "batch_id",
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
        self.client = ""  # the places it takes count for this caller: the key's name, else the address
        self.key = ""  # the id of the caller's key
        self.quotas: tuple[Quota, ...] = ()
        self.entries: Sequence[dict[str, Any]] = ()  # of a prediction, for the metrics
        self.is_hurried = False  # the caller's own short deadline: if it passes, the version is not to blame
        self.traceparent = ""
        self.batch_id = ""  # the request id that the upstream batch was sent under, if it is another request's

    def stage(self, name: str) -> Stage:
        """Return a context manager that adds the time spent inside to the stage `name`."""
        return Stage(self.stages, name)

    def carried(self) -> Options:
        """Return the options that identify the request to the handler: its id and its trace context."""
        return Options(self.request_id, traceparent=self.traceparent or None)

    def elapsed_s(self) -> float:
        """Return the seconds since the request came."""
        return time.perf_counter() - self.started

    def server_timing(self) -> str:
        """Return the value of the Server-Timing header: the stages so far, in ms."""
        stages = {**self.stages, "total": self.elapsed_s()}
        return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())

    def rate_limits(self) -> tuple[str, str]:
        """Return the values of the headers RateLimit-Policy and RateLimit, which list each quota.

        Source: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/11/
        """
        return (
            ", ".join(f'"{quota.kind}";q={quota.amount};w={quota.window_s}' for quota in self.quotas),
            ", ".join(f'"{quota.kind}";r={quota.remaining};t={quota.left_s}' for quota in self.quotas),
        )


class Stage:
    """A context manager that times one stage.

    `contextlib.contextmanager` costs several times as much, and each request has three stages.
    """

    __slots__ = ("_name", "_stages", "_started")

    def __init__(self, stages: dict[str, float], name: str) -> None:
        self._stages = stages
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._stages[self._name] = self._stages.get(self._name, 0.0) + time.perf_counter() - self._started


def request_id_of(scope: Scope) -> str:
    """Return the caller's own x-request-id if it matches `SANE_ID`, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return new_request_id()


def new_request_id() -> str:
    """Return 128 random bits in hexadecimal; `uuid.uuid4` takes ten times as long."""
    return os.urandom(16).hex()


def context_of(scope: Scope) -> RequestContext:
    """Return the request context that RequestMiddleware made for this request."""
    context: RequestContext = scope["gradserve"]
    return context
