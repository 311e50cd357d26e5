"""The client for asyncio has the client's methods and leaves the event loop free; the other tests run with both."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from typing import TYPE_CHECKING

import httpx
import pytest

from gradserve import AnswerUnreadable, AsyncClient, Client
from gradserve.calls import BATCH_IMAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def test_async_client_has_the_methods_and_parameters_of_the_client() -> None:
    replaced = {"heatmap"}

    def methods(cls: type) -> dict[str, str]:
        found = inspect.getmembers(cls, inspect.isfunction)
        return {name: str(inspect.signature(value)) for name, value in found if not name.startswith("_")}

    assert methods(AsyncClient) == {name: value for name, value in methods(Client).items() if name not in replaced}


def test_a_file_that_is_slow_to_read_does_not_hold_up_other_tasks(tmp_path: Path) -> None:
    pipe, another_task_ran = tmp_path / "image", threading.Event()
    ran_in_time = []
    os.mkfifo(pipe)

    def write() -> None:
        """Let the reader of the file wait until another task has run."""
        ran_in_time.append(another_task_ran.wait(2))
        pipe.write_bytes(b"image")

    async def scene() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
        asyncio.get_running_loop().call_later(0.01, another_task_ran.set)
        async with AsyncClient("http://gateway", transport=transport) as client:
            with pytest.raises(AnswerUnreadable):
                await client.predict(pipe)

    writer = threading.Thread(target=write)
    writer.start()
    asyncio.run(scene())
    writer.join()
    assert ran_in_time == [True]


def test_the_images_of_a_later_call_are_not_read_before_the_earlier_one_is_answered(
    document: Callable[..., dict],
) -> None:
    read = []

    def images() -> Iterator[bytes]:
        for number in range(BATCH_IMAGES + 2):
            read.append(number)
            yield b"x"

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append(len(read))
        count = request.read().count(b"\r\n\r\nx\r\n")
        return httpx.Response(200, json={**document(), "results": [document()] * count})

    async def scene() -> int:
        async with AsyncClient("http://gateway", transport=httpx.MockTransport(gateway)) as client:
            return len(await client.explain_batch(images()))

    seen: list[int] = []
    assert asyncio.run(scene()) == BATCH_IMAGES + 2
    assert seen == [BATCH_IMAGES + 1, BATCH_IMAGES + 2], "a call is sent once one image more does not fit"


def test_leaving_the_block_closes_the_connections() -> None:
    async def scene() -> None:
        client = AsyncClient("http://gateway", transport=httpx.MockTransport(lambda _: httpx.Response(200, json={})))
        async with client:
            assert await client.health() == {}
        with pytest.raises(RuntimeError, match="closed"):
            await client.health()

    asyncio.run(scene())
