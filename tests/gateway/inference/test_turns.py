"""Turns are limited and given in order of arrival, and none is lost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.errors import DeadlinePassed, Unavailable
from gateway.inference.torchserve import Deadline
from gateway.inference.turns import Turns

if TYPE_CHECKING:
    from conftest import Run


def test_turns_are_limited_and_given_in_order_of_arrival(run: Run) -> None:
    async def scene() -> tuple[int, list[int]]:
        turns, now, most_seen, order = Turns(), 0, 0, []

        async def call(number: int) -> None:
            nonlocal now, most_seen
            async with turns.turn(lambda: 2, Deadline(60)):
                now += 1
                most_seen = max(most_seen, now)
                order.append(number)
                await asyncio.sleep(0.01)
                now -= 1

        await asyncio.gather(*(call(number) for number in range(20)))
        assert turns._taken == 0
        return most_seen, order

    assert run(scene()) == (2, list(range(20)))


def test_all_turns_that_are_free_by_now_are_given_when_one_is_given_back(run: Run) -> None:
    async def scene() -> list[int]:
        turns, most, first, finish = Turns(), 1, asyncio.Event(), asyncio.Event()
        begun: list[int] = []

        async def call(number: int) -> None:
            async with turns.turn(lambda: most, Deadline(60)):
                begun.append(number)
                await (finish if number else first).wait()

        calls = [asyncio.create_task(call(number)) for number in range(5)]
        await asyncio.sleep(0.01)
        assert begun == [0]
        most = 3
        first.set()
        await asyncio.sleep(0.01)
        seen = list(begun)
        finish.set()
        await asyncio.gather(*calls)
        return seen

    assert run(scene()) == [0, 1, 2, 3]


def test_more_than_the_queue_are_refused_and_a_wait_ends_at_the_deadline(run: Run) -> None:
    async def scene() -> None:
        turns = Turns(max_waiting=1)
        async with turns.turn(lambda: 1, Deadline(60)):

            async def wait() -> None:
                async with turns.turn(lambda: 1, Deadline(0.5)):
                    pass

            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0.01)
            with pytest.raises(Unavailable) as refusal:
                await wait()
            assert refusal.value.code == "saturated"
            with pytest.raises(DeadlinePassed):
                await waiting
        assert (turns._taken, len(turns._waiting)) == (0, 0)

    run(scene())


def test_a_cancelled_wait_passes_its_turn_on(run: Run) -> None:
    async def scene() -> None:
        turns = Turns()
        holds = asyncio.Event()

        async def call(*, until: asyncio.Event | None = None) -> None:
            async with turns.turn(lambda: 1, Deadline(60)):
                if until is not None:
                    await until.wait()

        first = asyncio.create_task(call(until=holds))
        await asyncio.sleep(0)
        second, third = asyncio.create_task(call()), asyncio.create_task(call())
        await asyncio.sleep(0)
        holds.set()
        await first  # the turn is on its way to the second …
        second.cancel()
        await third
        assert turns._taken == 0

    run(scene())
