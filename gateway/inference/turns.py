"""Turns for what keeps a worker busy for long: rows of batches, and large images.

In each gateway process it is first come first served; over all processes at most so many are on their way at a time.
TorchServe serves its rows in the order in which they came, so what waits here does not stand before a single image.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from gateway.errors import DeadlinePassed, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.inference.torchserve import Deadline
    from gateway.server.shared_counters import SharedCounters

LOOK_EVERY_S = 0.005
"""How often a process that waits looks at what the others have on their way."""


class Turns:
    """The turns of one gateway process; at most `longest_line` wait."""

    def __init__(self, longest_line: float = math.inf) -> None:
        self._longest_line = longest_line
        self._taken = 0
        self._waiting: deque[tuple[asyncio.Future[None], Callable[[], int]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._rests_until = -math.inf
        self._tell_taken: Callable[[int], None] = lambda _count: None
        self._tell_waiting: Callable[[int], None] = lambda _count: None
        self._taken_elsewhere: Callable[[], int] = lambda: 0
        self._waiting_elsewhere: Callable[[], int] = lambda: 0

    def join(self, taken: SharedCounters, waiting: SharedCounters, seat: int) -> None:
        """Share the turns with the other gateway processes."""
        self._tell_taken, self._taken_elsewhere = partial(taken.tell, seat), partial(taken.sum_of_others, seat)
        self._tell_waiting, self._waiting_elsewhere = partial(waiting.tell, seat), partial(waiting.sum_of_others, seat)

    @asynccontextmanager
    async def turn(self, most: Callable[[], int], deadline: Deadline) -> AsyncIterator[None]:
        """Hold a turn, one of at most `most()` over all processes; that is asked whenever one could be given.

        Raises:
            Unavailable: too many wait already.
            DeadlinePassed: no turn came in time.
        """
        if self._waiting or not self._is_free(most):
            if len(self._waiting) >= self._longest_line:
                raise Unavailable("saturated")
            try:
                async with deadline.timeout():
                    await self._wait(most)
            except TimeoutError as error:
                raise DeadlinePassed(deadline.timeout_s) from error
        else:
            self._change(1)
        try:
            yield
        finally:
            self._give_back()

    def _is_free(self, most: Callable[[], int]) -> bool:
        is_resting = asyncio.get_running_loop().time() < self._rests_until
        return not is_resting and self._taken + self._taken_elsewhere() < most()

    def _change(self, by: int) -> None:
        self._taken += by
        self._tell_taken(self._taken)

    def _give_back(self) -> None:
        self._change(-1)
        if self._waiting_elsewhere():
            # They only look now and then: without a rest, who is quicker to take it again would have every turn.
            self._rests_until = asyncio.get_running_loop().time() + 2 * LOOK_EVERY_S
        else:
            self._look()

    async def _wait(self, most: Callable[[], int]) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (waiter, most)
        self._waiting.append(entry)
        self._look()
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._give_back()  # the turn came in the same turn of the loop in which the wait ended
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._tell_waiting(len(self._waiting))
            raise

    def _look(self) -> None:
        """Give turns to those who wait as far as there are any, and look again later if some still wait."""
        while self._waiting and self._is_free(self._waiting[0][1]):
            waiter, _ = self._waiting.popleft()
            if not waiter.done():
                self._change(1)
                waiter.set_result(None)
        self._tell_waiting(len(self._waiting))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)
