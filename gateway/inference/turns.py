"""Turns for requests that keep a worker busy for long: upstream batches of /predict/batch, and large images.

All gateway processes together have a limited number in flight; within a process they take turns in order of arrival.
TorchServe works in order of arrival, so a single image is not delayed by requests that wait here.
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

CHECK_EVERY_S = 0.005
"""Seconds after which a process with waiting requests checks again how many the other processes have in flight."""


class Turns:
    """The turns of one gateway process; at most `max_waiting` requests wait for one."""

    def __init__(self, max_waiting: float = math.inf) -> None:
        self._max_waiting = max_waiting
        self._taken = 0
        self._waiting: deque[tuple[asyncio.Future[None], Callable[[], int]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._paused_until = -math.inf
        self._share_taken: Callable[[int], None] = lambda _count: None
        self._share_waiting: Callable[[int], None] = lambda _count: None
        self._taken_elsewhere: Callable[[], int] = lambda: 0
        self._waiting_elsewhere: Callable[[], int] = lambda: 0

    def join(self, taken: SharedCounters, waiting: SharedCounters, slot: int) -> None:
        """Share the turns with the other gateway processes; `slot` is that of this process."""
        self._share_taken, self._taken_elsewhere = partial(taken.set, slot), partial(taken.sum_of_others, slot)
        self._share_waiting, self._waiting_elsewhere = partial(waiting.set, slot), partial(waiting.sum_of_others, slot)

    @asynccontextmanager
    async def turn(self, most: Callable[[], int], deadline: Deadline) -> AsyncIterator[None]:
        """Hold a turn; `most()` returns the number that all processes may hold, and is called before one is given.

        Raises:
            Unavailable: `max_waiting` requests wait already.
            DeadlinePassed: no turn came before the deadline.
        """
        if self._waiting or not self._is_free(most):
            if len(self._waiting) >= self._max_waiting:
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
        is_paused = asyncio.get_running_loop().time() < self._paused_until
        return not is_paused and self._taken + self._taken_elsewhere() < most()

    def _change(self, by: int) -> None:
        self._taken += by
        self._share_taken(self._taken)

    def _give_back(self) -> None:
        self._change(-1)
        if self._waiting_elsewhere():
            # The others check only every `CHECK_EVERY_S`: without this pause, one process would take every turn.
            self._paused_until = asyncio.get_running_loop().time() + 2 * CHECK_EVERY_S
        else:
            self._give_turns()

    async def _wait(self, most: Callable[[], int]) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (waiter, most)
        self._waiting.append(entry)
        self._give_turns()
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._give_back()  # the turn came in the same iteration of the event loop in which the wait ended
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._share_waiting(len(self._waiting))
            raise

    def _give_turns(self) -> None:
        """Give the free turns to the waiting requests, and check again later if some still wait."""
        while self._waiting and self._is_free(self._waiting[0][1]):
            waiter, _ = self._waiting.popleft()
            if not waiter.done():
                self._change(1)
                waiter.set_result(None)
        self._share_waiting(len(self._waiting))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(CHECK_EVERY_S, self._give_turns)
