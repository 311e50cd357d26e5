"""Overload: a bounded number of calls in flight for each kind, a short bounded wait for a place, then an honest 503.

TorchServe has no limit on how long a row waits in its queue and does not notice that a caller has gone. So a place is
held until TorchServe has answered or the deadline has passed, and what waits here waits briefly.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING

from gateway.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable


class BodyBudget:
    """Bytes of bodies held at a time: what bounds memory while bodies arrive, before there is a place to take."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Counts `size` more bytes; `give_back` ends it.

        Raises:
            Unavailable: they do not fit.
        """
        if self.held + size > self.limit:
            raise Unavailable("saturated")
        self.held += size

    def give_back(self, size: int) -> None:
        """Counts `size` bytes less."""
        self.held -= size


class ConcurrencyLimiter:
    """`limit` places; at most `limit` more callers wait, each `wait_s` seconds, first come first served.

    That line is for bursts. When it has not been empty for `wait_s` it helps nobody: as many are refused, and those who
    are not have only waited longer. Then an eighth of it is open, enough that no place stays empty.
    Source: controlled delay, Maurer 2015, "Fail at Scale", https://queue.acm.org/detail.cfm?id=2839461
    """

    def __init__(self, limit: int, wait_s: float) -> None:
        self.limit = limit
        self.taken = 0
        self.on_change: Callable[[int], None] = lambda _taken: None
        self._wait_s = wait_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._stands_since = 0.0
        self._empty_since = -math.inf

    @property
    def waiting(self) -> int:
        """The callers who wait for a place."""
        return len(self._waiting)

    def is_full(self, coming: int = 0) -> bool:
        """Whether a caller would be refused at once, after so many who are coming already."""
        return self.taken + len(self._waiting) + coming >= self.limit + self._longest_line()

    async def take(self) -> None:
        """Takes one place; `give_back` ends it.

        Raises:
            Unavailable: no place came free in time, or too many wait already.
        """
        if self.taken < self.limit and not self._waiting:
            self._change(1)
        else:
            await self._wait()

    def take_free(self, most: int) -> int:
        """Takes up to `most` places that are free now, and says how many; `give_back` ends it."""
        count = 0 if self._waiting else max(min(most, self.limit - self.taken), 0)
        self._change(count)
        return count

    def give_back(self, count: int) -> None:
        """Gives back `count` places."""
        for _ in range(count):
            self._free()

    def _free(self) -> None:
        """Hands the place to the first who still waits, or gives it back."""
        while self._waiting:
            waiter = self._waiting.popleft()
            self._note_empty()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._change(-1)

    def _change(self, by: int) -> None:
        self.taken += by
        self.on_change(self.taken)

    def _longest_line(self) -> int:
        now = asyncio.get_running_loop().time()
        is_emptied = not self._waiting and now - self._empty_since > self._wait_s
        stands = now - self._stands_since > self._wait_s and not is_emptied
        return max(1, self.limit // 8) if stands else self.limit

    def _note_empty(self) -> None:
        if not self._waiting:
            self._empty_since = asyncio.get_running_loop().time()

    async def _wait(self) -> None:
        if len(self._waiting) >= self._longest_line():
            raise Unavailable("saturated")
        loop = asyncio.get_running_loop()
        if not self._waiting and loop.time() - self._empty_since > self._wait_s:
            self._stands_since = loop.time()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._free()  # the place came in the same turn of the loop in which the wait ended
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
                self._note_empty()
            if isinstance(error, TimeoutError):
                raise Unavailable("saturated") from None
            raise
