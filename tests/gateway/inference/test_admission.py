"""Places are limited, waits are short, and no place is lost if a wait ends while its place is given."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.errors import Unavailable
from gateway.inference.admission import ConcurrencyLimiter, PixelBudget
from gateway.refusals import CallerHasTooManyPixels, TooManyPixels

if TYPE_CHECKING:
    from conftest import Run


def test_a_free_place_goes_to_the_first_waiting_caller() -> None:
    async def scene() -> list[str]:
        places, order = ConcurrencyLimiter(1, 1.0), []
        await places.take()

        async def call(name: str) -> None:
            await places.take()
            order.append(name)
            places.give_back(1)

        calls = [asyncio.create_task(call(name)) for name in ("first",)]
        await asyncio.sleep(0)
        places.give_back(1)
        await places.take()
        order.append("second")
        places.give_back(1)
        await asyncio.gather(*calls)
        assert places.taken == 0
        return order

    assert asyncio.run(scene()) == ["first", "second"]


def test_a_wait_ends_with_saturated_and_leaks_no_place() -> None:
    async def scene() -> None:
        places = ConcurrencyLimiter(1, 0.01)
        await places.take()
        with pytest.raises(Unavailable) as refusal:
            await places.take()
        assert refusal.value.code == "saturated"
        places.give_back(1)
        assert places.taken == 0
        await places.take()

    asyncio.run(scene())


def test_at_most_as_many_calls_wait_as_there_are_places() -> None:
    async def scene() -> None:
        places = ConcurrencyLimiter(2, 5.0)
        assert places.take_free(9) == 2
        waiting = [asyncio.create_task(places.take()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(places.take(), 0.5)
        places.give_back(2)
        await asyncio.gather(*waiting)
        assert places.taken == 2

    asyncio.run(scene())


def test_a_cancelled_wait_passes_its_place_on() -> None:
    async def scene() -> None:
        places = ConcurrencyLimiter(1, 5.0)
        await places.take()
        waiting = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        places.give_back(1)  # the place is on its way to the waiter …
        waiting.cancel()  # … who leaves in the same turn of the loop
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert places.taken == 0

    asyncio.run(scene())


def test_free_places_are_not_taken_before_waiting_callers() -> None:
    async def scene() -> None:
        places = ConcurrencyLimiter(2, 5.0)
        assert places.take_free(2) == 2
        waiting = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        assert places.take_free(1) == 0
        places.give_back(2)
        await waiting
        assert places.take_free(5) == 1

    asyncio.run(scene())


def test_a_standing_queue_is_limited_to_an_eighth_until_it_has_been_empty(run: Run) -> None:
    async def scene() -> None:
        places = ConcurrencyLimiter(16, 1.0)
        assert places.take_free(16) == 16
        waiting = [asyncio.create_task(places.take()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not places.is_full(), "a burst may use the whole line"
        for _ in range(4):  # the line moves, but is never empty
            await asyncio.sleep(0.2)
            waiting.append(asyncio.create_task(places.take()))
            await asyncio.sleep(0)
            places.give_back(1)
        await asyncio.sleep(0.25)
        assert places.is_full()
        with pytest.raises(Unavailable):
            await places.take()
        places.give_back(1)
        assert places.is_full(), "two wait"
        places.give_back(1)
        assert not places.is_full(), "one waits"
        places.give_back(1)
        await asyncio.gather(*waiting)
        waiting = [asyncio.create_task(places.take()) for _ in range(2)]
        await asyncio.sleep(0)
        assert places.is_full(), "the line was empty only now"
        places.give_back(2)
        await asyncio.gather(*waiting)
        await asyncio.sleep(1.1)
        waiting = [asyncio.create_task(places.take()) for _ in range(15)]
        await asyncio.sleep(0)
        assert not places.is_full(), "the overload is over"
        places.give_back(16)
        await asyncio.gather(*waiting)

    run(scene())


def test_one_caller_gets_at_most_its_places_and_queue_and_does_not_keep_others_out() -> None:
    async def scene() -> None:
        places = ConcurrencyLimiter(5, 5.0, per_caller=4)
        for _ in range(4):
            await places.take("flood")
        waiting = [asyncio.create_task(places.take("flood")) for _ in range(4)]
        await asyncio.sleep(0)
        assert places.is_full_for("flood")
        assert places.may_be_full_for_one()
        with pytest.raises(Unavailable):
            await places.take("flood")
        assert not places.is_full_for("stranger")
        await asyncio.wait_for(places.take("stranger"), 0.1)  # past those who wait
        assert places.taken == 5
        places.give_back(1, "stranger")
        await asyncio.sleep(0)
        assert places.taken == 4, "the place of another is none for one who has all that it may"
        places.give_back(1, "flood")
        await waiting[0]
        assert places.take_free(9, "stranger") == 0, "who waits comes first"
        places.give_back(3, "flood")
        await asyncio.gather(*waiting)
        places.give_back(4, "flood")
        assert (places.taken, places.waiting) == (0, 0)

    asyncio.run(scene())


def test_pixels_of_a_callers_calls_are_bounded_together_and_given_back() -> None:
    budget = PixelBudget(100)
    with pytest.raises(TooManyPixels), budget.hold(101, "one"):
        pass
    with budget.hold(60, "one"):
        with pytest.raises(CallerHasTooManyPixels) as refusal, budget.hold(41, "one"):
            pass
        assert refusal.value.headers == {"retry-after": "1"}
        with budget.hold(40, "one"), budget.hold(100, "another"):
            pass
    with budget.hold(100, "one"):
        pass
