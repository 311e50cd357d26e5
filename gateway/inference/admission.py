"""Limits under overload: a bounded number of calls in flight for each kind, a short wait for a place, then 503.

TorchServe does not limit the time that a request waits in its queue, and does not notice that a caller disconnected. So
a call holds its place until TorchServe has answered or the deadline has passed, and waits for a place only briefly.

Each model has its own places and turns, which follow from its own workers: the overload of one takes none from another.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from gateway.errors import Unavailable
from gateway.inference.routing import Workers
from gateway.inference.turns import Turns
from gateway.refusals import CallerHasTooManyPixels, TooManyPixels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.inference.questions import Kind

# Large images that may wait for a turn in one process; they hold places while they wait.
MOST_LARGE_WAITING = 4


class BodyBudget:
    """The bytes of request bodies held at a time, at most `limit`: they arrive before the call takes a place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Count `size` more bytes, until `give_back`.

        Raises:
            Unavailable: there would be more than `limit`.
        """
        if self.held + size > self.limit:
            raise Unavailable("saturated")
        self.held += size

    def give_back(self, size: int) -> None:
        """Count `size` bytes less."""
        self.held -= size


class PixelBudget:
    """The pixels of each caller's images in flight, at most `limit` per caller in each gateway process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[str] = Counter()

    def take(self, pixels: int, caller: str) -> None:
        """Count `pixels` as the caller's, until `give_back`.

        Raises:
            TooManyPixels: they are more than `limit`.
            CallerHasTooManyPixels: they are more than `limit` together with those that the caller has in flight.
        """
        if pixels > self.limit:
            raise TooManyPixels(pixels, self.limit)
        if self._held[caller] + pixels > self.limit:
            raise CallerHasTooManyPixels(self.limit)
        self._held[caller] += pixels

    def give_back(self, pixels: int, caller: str) -> None:
        """Count `pixels` of the caller's less."""
        self._held[caller] -= pixels
        if not self._held[caller]:
            del self._held[caller]

    def hold(self, pixels: int, caller: str) -> HeldPixels:
        """Return a context manager that takes `pixels` on entry, as `take`, and gives them back on exit."""
        return HeldPixels(self, pixels, caller)


class HeldPixels:
    """A context manager that holds a caller's pixels; `contextlib.contextmanager` would cost three times as much."""

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
    """`limit` places for calls, and a queue of at most `limit` calls that wait `wait_s` seconds for one, in order.

    One caller has at most `per_caller` places (default: `limit`) and as many calls in the queue, so that a caller who
    uses all of these does not keep other callers out.

    The queue absorbs bursts. If it has not been empty for `wait_s`, the overload lasts, and a long queue only makes the
    served calls slower. Then its length is limited to an eighth, which still keeps every place in use.
    Source: controlled delay, Maurer 2015, "Fail at Scale", https://queue.acm.org/detail.cfm?id=2839461
    """

    def __init__(self, limit: int, wait_s: float, *, per_caller: int | None = None) -> None:
        self.limit = limit
        self._per_caller = limit if per_caller is None else per_caller
        self._taken_by: Counter[str] = Counter()
        self._waiting_by: Counter[str] = Counter()
        self.taken = 0
        self._wait_s = wait_s
        self._waiting: deque[tuple[asyncio.Future[None], str]] = deque()
        self._standing_since = 0.0
        self._empty_since = -math.inf

    def resize(self, limit: int, per_caller: int) -> None:
        """Change the number of places; calls that have one keep it."""
        self.limit, self._per_caller = limit, per_caller

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a place."""
        return len(self._waiting)

    def is_full(self) -> bool:
        """Return True if any caller's call would be refused at once."""
        return self.taken + len(self._waiting) >= self.limit + self._queue_limit()

    def may_be_full_for_one(self) -> bool:
        """Return True if one caller could hold all the places it may have: a quick check without the caller's name."""
        return self.taken + len(self._waiting) >= self._per_caller

    def is_full_for(self, caller: str) -> bool:
        """Return True if this caller's call would be refused at once."""
        held = self._taken_by[caller] + self._waiting_by[caller]
        return held >= self._per_caller + min(self._queue_limit(), self._per_caller)

    async def take(self, caller: str = "") -> None:
        """Take one place, until `give_back`.

        Raises:
            Unavailable: no place became free in time, or the queue is full.
        """
        # If a place is free, every waiting caller already holds as many as it may.
        if self.taken < self.limit and self._taken_by[caller] < self._per_caller:
            self._change(1, caller)
        else:
            await self._wait(caller)

    def take_free(self, most: int, caller: str = "") -> int:
        """Take up to `most` places that are free now, until `give_back`, and return how many were taken."""
        free = min(self.limit - self.taken, self._per_caller - self._taken_by[caller])
        count = 0 if self._waiting else max(min(most, free), 0)
        self._change(count, caller)
        return count

    def give_back(self, count: int, caller: str = "") -> None:
        """Give back `count` places."""
        for _ in range(count):
            self._free(caller)

    def _free(self, caller: str) -> None:
        """Give the place back, and hand it to the first call in the queue whose caller may have one more."""
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

    def _leave(self, entry: tuple[asyncio.Future[None], str]) -> None:
        """Remove one call from the queue."""
        self._waiting.remove(entry)
        self._waiting_by[entry[1]] -= 1
        if not self._waiting_by[entry[1]]:
            del self._waiting_by[entry[1]]
        self._note_empty()

    def _queue_limit(self) -> int:
        now = asyncio.get_running_loop().time()
        is_emptied = not self._waiting and now - self._empty_since > self._wait_s
        is_standing = now - self._standing_since > self._wait_s and not is_emptied
        return max(1, self.limit // 8) if is_standing else self.limit

    def _note_empty(self) -> None:
        if not self._waiting:
            self._empty_since = asyncio.get_running_loop().time()

    async def _wait(self, caller: str) -> None:
        most = self._queue_limit()
        if len(self._waiting) >= most or self._waiting_by[caller] >= min(most, self._per_caller):
            raise Unavailable("saturated")
        loop = asyncio.get_running_loop()
        if not self._waiting and loop.time() - self._empty_since > self._wait_s:
            self._standing_since = loop.time()
        waiter: asyncio.Future[None] = loop.create_future()
        entry = (waiter, caller)
        self._waiting.append(entry)
        self._waiting_by[caller] += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._free(caller)  # the place came in the same iteration of the event loop in which the wait ended
            elif entry in self._waiting:
                self._leave(entry)
            if isinstance(error, TimeoutError):
                raise Unavailable("saturated") from None
            raise


class Places(NamedTuple):
    """The calls to one model that one caller may have in flight in one gateway process, by kind."""

    predict: int
    explain: int
    backward: int


def for_all(for_one: int) -> int:
    """Return the places for all callers together: a quarter more than one caller may have."""
    return for_one + math.ceil(for_one / 4)


class ModelLimits:
    """The limits of one model's calls in one gateway process.

    Attributes:
        predict, explain, backward: the places of predictions, of explanations in the forward pass, and of the others.
        limiters: these three by the name of their kind.
        batch_turns: the turns of upstream batches of /predict/batch.
        large_turns: the turns of large images, by the entry that they go to.
        last_single: when the last single image came, by the monotonic clock.
    """

    def __init__(self, places: Places, wait_s: float) -> None:
        self.predict, self.explain, self.backward = (
            ConcurrencyLimiter(for_all(for_one), wait_s, per_caller=for_one) for for_one in places
        )
        self.limiters = {"predict": self.predict, "explain": self.explain, "backward": self.backward}
        self.batch_turns = Turns()
        self.large_turns: dict[Kind, Turns] = {
            "predict": Turns(MOST_LARGE_WAITING),
            "explain": Turns(MOST_LARGE_WAITING),
        }
        self.last_single = -math.inf

    def resize(self, places: Places) -> None:
        """Change the number of places; calls that have one keep it."""
        for limiter, for_one in zip(self.limiters.values(), places, strict=True):
            limiter.resize(for_all(for_one), for_one)

    def is_idle(self) -> bool:
        """Return True if no call has a place or waits for one."""
        return not any(limiter.taken or limiter.waiting for limiter in self.limiters.values())


class Admission:
    """The limits of every model. `places_of` returns a model's places by its workers."""

    def __init__(self, places_of: Callable[[Workers], Places], wait_s: float) -> None:
        self._places_of = places_of
        self._wait_s = wait_s
        self._models: dict[str, ModelLimits] = {}

    def of(self, model: str) -> ModelLimits:
        """Return the limits of `model`; until `fit` they are those of one worker."""
        limits = self._models.get(model)
        if limits is None:
            limits = self._models[model] = ModelLimits(self._places_of(Workers(1)), self._wait_s)
        return limits

    def fit(self, workers: Mapping[str, Workers]) -> None:
        """Fit each model's places to its workers; a model without an entry is gone and has none."""
        for model, own in workers.items():
            self.of(model).resize(self._places_of(own))
        for model, limits in self._models.items():
            if model not in workers and limits.is_idle():
                limits.resize(Places(0, 0, 0))

    def limiters(self) -> list[tuple[str, str, ConcurrencyLimiter]]:
        """Return the places of every model and kind, each with model and kind."""
        return [
            (model, kind, limiter)
            for model, limits in self._models.items()
            for kind, limiter in limits.limiters.items()
        ]
