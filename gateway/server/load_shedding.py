"""Refuse calls that get no place before the application is called.

In a flood most calls end here, and the CPU time that they take is missing for the calls that are served. The
application's task, request and response would double the cost of a refusal.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from starlette.requests import Request

from gateway.api.problems import raw_problem
from gateway.errors import Unavailable
from gateway.request_context import request_id_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Scope

    from gateway.inference.admission import ConcurrencyLimiter
    from gateway.state import AppState


class LoadShedder:
    """Finds the calls that would get no place, and makes their answers."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        predict, explain = state.service.predict_limiter, state.service.explain_limiter
        self._limiters = {"/predict": predict, "/predict/batch": predict, "/explain": explain}
        # Calls admitted in this iteration of the event loop; they take their places in the next one. They count by
        # caller where it was looked up, which is done only when one caller could hold all the places it may have.
        self._coming: Counter[tuple[ConcurrencyLimiter, str | None]] = Counter()

    def applies(self, scope: Scope) -> bool:
        """Return True if neither a place nor the queue has room for this call, or for one more of its caller's."""
        limiter = self._limiters.get(scope["path"])
        if limiter is None:
            return False
        coming = self._coming_to(limiter)
        if limiter.is_full(coming):
            return True
        client = self._client_of(scope, limiter, coming)
        # Admitted calls of unknown callers may be this one's.
        own = self._coming[limiter, None] + self._coming[limiter, client]
        return client is not None and limiter.is_full_for(client, own)

    def _coming_to(self, limiter: ConcurrencyLimiter) -> int:
        return sum(count for (of, _), count in self._coming.items() if of is limiter)

    def _client_of(self, scope: Scope, limiter: ConcurrencyLimiter, coming: int) -> str | None:
        if not limiter.may_be_full_for_one(coming):
            return None  # the usual case, which saves finding the caller
        return self._state.callers.client_of(Request(scope))

    def _count_admitted(self, scope: Scope) -> None:
        if (limiter := self._limiters.get(scope["path"])) is not None:
            if not self._coming:
                asyncio.get_running_loop().call_soon(self._coming.clear)
            client = self._client_of(scope, limiter, self._coming_to(limiter))
            self._coming[limiter, client] += 1

    def answer(self, scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """Return the bytes of the whole refusal, with `headers` added; None if the application has to answer.

        The application answers refusals too while the gateway drains, traces, or allows other origins, because these
        answers need more headers or a span.
        """
        state = self._state
        needs_application = state.is_draining or state.tracer is not None or state.settings.cors_origins
        if needs_application or scope["method"] != "POST":
            return None
        if not self.applies(scope):
            self._count_admitted(scope)
            return None
        state.refused_early[scope["path"]] += 1
        request_id = request_id_of(scope).encode("ascii")
        head, between, rest = _around_id(len(request_id))
        own = (b"\r\n%b: %b" % header for header in headers)
        return b"".join((head, request_id, *own, between, request_id, rest))


@lru_cache(maxsize=128)
def _around_id(length: int) -> tuple[bytes, bytes, bytes]:
    """Return the answer in three pieces, to be joined by the request id, which has `length` characters."""
    mark = "~" * length  # a character that no id has
    head, between, rest = raw_problem(Unavailable("saturated"), mark).split(mark.encode("ascii"))
    return head, between, rest
