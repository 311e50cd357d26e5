"""Overload: a bounded number of calls in flight for each kind, a short bounded wait for a place, then an honest 503.

TorchServe has no limit on how long a row waits in its queue and does not notice that a caller has gone. So a place is
held until TorchServe has answered or the deadline has passed, and what waits here waits briefly.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from typing import TYPE_CHECKING

from gateway.errors import Unavailable
from gateway.refusals import CallerHasTooManyPixels, TooManyPixels

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


class PixelBudget:
    """Pixels of images in flight by caller: what one caller may have decoded at a time, `limit` in each process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[str] = Counter()

    def take(self, pixels: int, caller: str) -> None:
        """Count `pixels` as the caller's; `give_back` ends it.

        Raises:
            TooManyPixels: they do not fit, alone or with those that the caller has in flight.
        """
        if pixels > self.limit:
            raise TooManyPixels(pixels, self.limit)
        if self._held[caller] + pixels > self.limit:
            raise CallerHasTooManyPixels(self.limit)
        self._held[caller] += pixels

    def give_back(self, pixels: int, caller: str) -> None:
        """Count `pixels` less."""
        self._held[caller] -= pixels
        if not self._held[caller]:
            del self._held[caller]

    def hold(self, pixels: int, caller: str) -> HeldPixels:
        """Return a context that counts `pixels` as the caller's while it lasts; it raises what `take` raises."""
        return HeldPixels(self, pixels, caller)


class HeldPixels:
    """Pixels that count as a caller's; a generator's context would cost each call three times as much."""

    __slots__ = ("_budget", "_caller", "_pixels")

    def __init__(self, budget: PixelBudget, pixels: int, caller: str) -> None:
        self._budget = budget
        self._pixels = pixels
        self._caller = caller

    def __enter__(self) -> None:
        self._budget.take(self._pixels, self._caller)

    def __exit__(self, *exception: object) -> None:
        self._budget.give_back(self._pixels, self._caller)


class ConcurrencyLimiter:
    """`limit` places; at most `limit` more callers wait, each `wait_s` seconds, first come first served.

    One caller has at most `per_caller` places (all of them, unless said otherwise) and as many who wait, so that a
    caller who fills them keeps nobody else out.

    That line is for bursts. When it has not been empty for `wait_s` it helps nobody: as many are refused, and those who
    are not have only waited longer. Then an eighth of it is open, enough that no place stays empty.
    Source: controlled delay, Maurer 2015, "Fail at Scale", https://queue.acm.org/detail.cfm?id=2839461
    """

    def __init__(self, limit: int, wait_s: float, *, per_caller: int | None = None) -> None:
        self.limit = limit
        self._per_caller = limit if per_caller is None else per_caller
        self._taken_by: Counter[str] = Counter()
        self._waiting_by: Counter[str] = Counter()
        self.taken = 0
        self.on_change: Callable[[int], None] = lambda _taken: None
        self._wait_s = wait_s
        self._waiting: deque[tuple[asyncio.Future[None], str]] = deque()
        self._stands_since = 0.0
        self._empty_since = -math.inf

    @property
    def waiting(self) -> int:
        """The callers who wait for a place."""
        return len(self._waiting)

    def is_full(self, coming: int = 0) -> bool:
        """Whether a caller would be refused at once, after so many who are coming already."""
        return self.taken + len(self._waiting) + coming >= self.limit + self._longest_line()

    def may_be_full_for_one(self, coming: int = 0) -> bool:
        """Return True if so many are in flight that one caller could have all that are for one."""
        return self.taken + len(self._waiting) + coming >= self._per_caller

    def is_full_for(self, caller: str, coming: int = 0) -> bool:
        """Return True if this caller would be refused at once, after so many calls that are coming already."""
        held = self._taken_by[caller] + self._waiting_by[caller] + coming
        return held >= self._per_caller + min(self._longest_line(), self._per_caller)

    async def take(self, caller: str = "") -> None:
        """Takes one place; `give_back` ends it.

        Raises:
            Unavailable: no place came free in time, or too many wait already.
        """
        # Where a place is free, all who wait have as many as they may.
        if self.taken < self.limit and self._taken_by[caller] < self._per_caller:
            self._change(1, caller)
        else:
            await self._wait(caller)

    def take_free(self, most: int, caller: str = "") -> int:
        """Takes up to `most` places that are free now, and says how many; `give_back` ends it."""
        free = min(self.limit - self.taken, self._per_caller - self._taken_by[caller])
        count = 0 if self._waiting else max(min(most, free), 0)
        self._change(count, caller)
        return count

    def give_back(self, count: int, caller: str = "") -> None:
        """Gives back `count` places."""
        for _ in range(count):
            self._free(caller)

    def _free(self, caller: str) -> None:
        """Gives the place back, and hands it to the first who waits and may have it."""
        self._change(-1, caller)
        for entry in self._waiting:
            waiter, other = entry
            if not waiter.done() and self._taken_by[other] < self._per_caller:
                self._leave(entry)
                self._change(1, other)
                waiter.set_result(None)
                return

    def _change(self, by: int, caller: str) -> None:
        self.taken += by
        self._taken_by[caller] += by
        if not self._taken_by[caller]:
            del self._taken_by[caller]
        self.on_change(self.taken)

    def _leave(self, entry: tuple[asyncio.Future[None], str]) -> None:
        """Take one who waits out of the line."""
        self._waiting.remove(entry)
        self._waiting_by[entry[1]] -= 1
        if not self._waiting_by[entry[1]]:
            del self._waiting_by[entry[1]]
        self._note_empty()

    def _longest_line(self) -> int:
        now = asyncio.get_running_loop().time()
        is_emptied = not self._waiting and now - self._empty_since > self._wait_s
        stands = now - self._stands_since > self._wait_s and not is_emptied
        return max(1, self.limit // 8) if stands else self.limit

    def _note_empty(self) -> None:
        if not self._waiting:
            self._empty_since = asyncio.get_running_loop().time()

    async def _wait(self, caller: str) -> None:
        line = self._longest_line()
        if len(self._waiting) >= line or self._waiting_by[caller] >= min(line, self._per_caller):
            raise Unavailable("saturated")
        loop = asyncio.get_running_loop()
        if not self._waiting and loop.time() - self._empty_since > self._wait_s:
            self._stands_since = loop.time()
        waiter: asyncio.Future[None] = loop.create_future()
        entry = (waiter, caller)
        self._waiting.append(entry)
        self._waiting_by[caller] += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._free(caller)  # the place came in the same turn of the loop in which the wait ended
            elif entry in self._waiting:
                self._leave(entry)
            if isinstance(error, TimeoutError):
                raise Unavailable("saturated") from None
            raise
