"""Refuses calls for want of a place before anything is made for them.

In a flood most calls end here, and what each costs is taken from those that are answered: the application's task,
request and response would cost as much again as reading the call and sending these bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.errors import Unavailable
from gateway.exchange import Exchange, request_id_of
from gateway.problems import raw_problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Scope

    from gateway.parts import Parts


class EarlyRefusals:
    """Which calls would be refused after all the work of getting to a place, and their answers."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        predict, explain = parts.dataplane.predict_places, parts.dataplane.explain_places
        self._places = {"/predict": predict, "/predict/batch": predict, "/explain": explain}

    def applies(self, path: str) -> bool:
        """Whether there is no place for a call to `path`, nor one in the line for it."""
        places = self._places.get(path)
        return places is not None and places.is_full()

    def answer(self, scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The whole answer, with these headers too, counted as any other; None where the application has to answer.

        It has to where an answer says more than this one: to other sites' pages, to who traces, while draining.
        """
        parts = self._parts
        says_more = parts.is_draining or parts.tracer is not None or parts.settings.cors_origins
        if says_more or scope["method"] != "POST" or not self.applies(scope["path"]):
            return None
        error = Unavailable("saturated")
        exchange = Exchange(request_id_of(scope))
        exchange.route, exchange.status, exchange.code = scope["path"], error.status, error.code
        timing = (b"server-timing", exchange.server_timing().encode("ascii"))
        content = raw_problem(error, exchange.request_id, (*headers, timing))
        parts.metrics.finish("POST", exchange)
        parts.saturated += 1
        return content
