"""Turns are limited over all processes and given in order of arrival in each process, and none is lost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.errors import DeadlinePassed, Unavailable
from gateway.inference.torchserve import Deadline
from gateway.inference.turns import Turns
from gateway.server.shared_counters import SharedCounters

if TYPE_CHECKING:
    from conftest import Run


def joined(processes: int, max_waiting: int = 100) -> list[Turns]:
    taken, waiting = SharedCounters(), SharedCounters()
    made = [Turns(max_waiting) for _ in range(processes)]
    for slot, turns in enumerate(made):
        turns.join(taken, waiting, slot)
    return made


def test_turns_are_limited_over_all_processes_and_every_process_gets_its_share(run: Run) -> None:
    async def scene() -> tuple[int, list[int]]:
        made, now, most_seen, order = joined(2), 0, 0, []

        async def call(process: int) -> None:
            nonlocal now, most_seen
            async with made[process].turn(lambda: 2, Deadline(60)):
                now += 1
                most_seen = max(most_seen, now)
                await asyncio.sleep(0.04)
                order.append(process)
                now -= 1

        await asyncio.gather(*(call(0) for _ in range(20)), *(call(1) for _ in range(20)))
        assert [turns._taken for turns in made] == [0, 0]
        return most_seen, order

    most_seen, order = run(scene())
    assert most_seen == 2
    assert 5 <= order[:20].count(1) <= 15, "neither process has all turns while the other waits"


def test_more_than_the_queue_are_refused_and_a_wait_ends_at_the_deadline(run: Run) -> None:
    async def scene() -> None:
        (turns,) = joined(1, max_waiting=1)
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
        (turns,) = joined(1)
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
