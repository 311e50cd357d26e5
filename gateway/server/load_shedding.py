"""Refuses calls for want of a place before anything is made for them.

In a flood most calls end here, and what each costs is taken from those that are answered: the application's task,
request and response would cost as much again as reading the call and sending these bytes.
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
    """Which calls would be refused after all the work of getting to a place, and their answers."""

    def __init__(self, parts: AppState) -> None:
        self._parts = parts
        predict, explain = parts.service.predict_limiter, parts.service.explain_limiter
        self._places = {"/predict": predict, "/predict/batch": predict, "/explain": explain}
        # Calls that were let in while the loop reads what has come; when it turns, they take their places.
        self._coming: Counter[ConcurrencyLimiter] = Counter()

    def applies(self, scope: Scope) -> bool:
        """Return True if there is no place for this call, nor one in the line, or none that its caller may have."""
        places = self._places.get(scope["path"])
        if places is None:
            return False
        coming = self._coming[places]
        if places.is_full(coming):
            return True
        if not places.may_be_full_for_one(coming):
            return False  # most calls: nobody looks up whose they are
        client = self._parts.callers.client_of(Request(scope))
        return client is not None and places.is_full_for(client, coming)

    def _let_in(self, path: str) -> None:
        if (places := self._places.get(path)) is not None:
            if not self._coming:
                asyncio.get_running_loop().call_soon(self._coming.clear)
            self._coming[places] += 1

    def answer(self, scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The whole answer, with these headers too; None where the application has to answer.

        It has to where an answer says more than this one: to other sites' pages, to who traces, while draining.
        """
        parts = self._parts
        says_more = parts.is_draining or parts.tracer is not None or parts.settings.cors_origins
        if says_more or scope["method"] != "POST":
            return None
        if not self.applies(scope):
            self._let_in(scope["path"])
            return None
        parts.refused_early[scope["path"]] += 1
        request_id = request_id_of(scope).encode("ascii")
        head, between, rest = _around_id(len(request_id))
        own = (b"\r\n%b: %b" % header for header in headers)
        return b"".join((head, request_id, *own, between, request_id, rest))


@lru_cache(maxsize=128)
def _around_id(length: int) -> tuple[bytes, bytes, bytes]:
    """The answer without the request's id, which has this length and is told twice."""
    mark = "~" * length  # no id has this character
    head, between, rest = raw_problem(Unavailable("saturated"), mark).split(mark.encode("ascii"))
    return head, between, rest
