"""The request context: facts about one request for its log line, its metrics and its Server-Timing header.

Only gateway/api/middleware.py writes it. The routes leave there what they found out, in `request.state`: `caller`,
`answer` and `error`.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

    from gateway.inference.answer import Answer

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


class Caller(NamedTuple):
    """The caller of a request.

    `client` is what its places count for: the key's name, else the address. `key` is the key's id; `name` and `key` are
    empty without keys. `quotas` are those that the request was counted against. `models` are those that it may call,
    empty: all.
    """

    client: str = ""
    name: str = ""
    key: str = ""
    quotas: tuple[Quota, ...] = ()
    models: tuple[str, ...] = ()


class RequestContext:
    """The facts about one request; `stages` has the seconds spent in each stage, in the order in which they ended."""

    __slots__ = (
        "batch_id",
        "caller",
        "code",
        "entries",
        "is_hurried",
        "model",
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
        self.status = 0
        self.code = ""
        self.model = ""
        self.version = ""
        self.caller = Caller()
        self.entries: Sequence[dict[str, Any]] = ()  # of a prediction, for the metrics
        self.is_hurried = False  # the caller's own short deadline: if it passes, the version is not to blame
        self.traceparent = ""
        self.batch_id = ""  # the request id that the upstream batch was sent under, if it is another request's

    def note_answer(self, answer: Answer) -> None:
        """Take over the facts of the inference service's answer."""
        self.model, self.version, self.entries = answer.model, answer.version, answer.entries
        self.stages |= answer.timings
        self.code, self.batch_id, self.is_hurried = answer.code, answer.batch_id, answer.is_hurried

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
            ", ".join(f'"{quota.kind}";q={quota.amount};w={quota.window_s}' for quota in self.caller.quotas),
            ", ".join(f'"{quota.kind}";r={quota.remaining};t={quota.left_s}' for quota in self.caller.quotas),
        )


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
