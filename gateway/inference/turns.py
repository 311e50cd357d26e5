"""Turns for requests that keep a worker busy for long: upstream batches of /predict/batch, and large images.

A limited number is in flight; the others take turns in order of arrival. TorchServe works in order of arrival, so a
single image is not delayed by requests that wait here. Without turns, a flood of batches by one caller made another
caller's single images wait for 2,400 ms at the median instead of 22 (benchmarks/results/mechanisms.json, `hostile`).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from gateway.errors import DeadlinePassed, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.inference.torchserve import Deadline


class Turns:
    """The turns of one gateway process; at most `max_waiting` requests wait for one."""

    def __init__(self, max_waiting: float = math.inf) -> None:
        self._max_waiting = max_waiting
        self._taken = 0
        self._waiting: deque[tuple[asyncio.Future[None], Callable[[], int]]] = deque()

    @asynccontextmanager
    async def turn(self, most: Callable[[], int], deadline: Deadline) -> AsyncIterator[None]:
        """Hold a turn; `most()` returns the number in flight that is allowed now, at least 1.

        Raises:
            Unavailable: `max_waiting` requests wait already.
            DeadlinePassed: no turn came before the deadline.
        """
        if self._waiting or self._taken >= most():
            if len(self._waiting) >= self._max_waiting:
                raise Unavailable("saturated")
            try:
                async with deadline.timeout():
                    await self._wait(most)
            except TimeoutError as error:
                raise DeadlinePassed(deadline.timeout_s) from error
        else:
            self._taken += 1
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Give the turn back, and give all free turns to waiting requests."""
        self._taken -= 1
        while self._waiting and self._taken < self._waiting[0][1]():
            waiter, _ = self._waiting.popleft()
            if not waiter.done():
                self._taken += 1
                waiter.set_result(None)

    async def _wait(self, most: Callable[[], int]) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (waiter, most)
        self._waiting.append(entry)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._give_back()  # the turn came in the same iteration of the event loop in which the wait ended
            elif entry in self._waiting:
                self._waiting.remove(entry)
            raise
