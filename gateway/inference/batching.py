"""Images that arrive together travel together: single images of several callers as one row to TorchServe.

To TorchServe and the handler a row costs more than a small image in it. So from all gateway processes together only
about as many rows as the version has workers are on their way at a time. While there are fewer nobody waits; who comes
when there are as many goes, with all the others who do, when one has come back.

Nobody gets another's answer: a row holds images of one target and one `top_k`, its entries are handed out by position,
each to the call whose image was put there, and an answer with another number of entries is none. Each call keeps its
own deadline; the row's is the latest of them, and who has left before it goes is not in it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from gateway.errors import DeadlinePassed
from gateway.inference.image_header import LARGE_PIXELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.wire import Entry
    from gateway.inference.routing import Target
    from gateway.inference.torchserve import Deadline, TorchServe
    from gateway.request_context import RequestContext

# A large image goes alone: to copy and to decode it would keep the others waiting.
MAX_SHARED_BYTES = 256 * 1024
# A row that has been away for so long may never come back: nobody waits for it any more.
STALLED_S = 0.5


class DynamicBatcher:
    """Sends images through `upstream` in rows of at most `most_images`, as one of `processes` that do so."""

    def __init__(self, upstream: TorchServe, most_images: int, processes: int) -> None:
        self._upstream = upstream
        self._most_images = most_images
        self._processes = processes
        # Weak: a line goes when nobody waits in it and none of its rows is on its way.
        self._lines: WeakValueDictionary[tuple[str, str, str, int], BatchQueue] = WeakValueDictionary()

    async def predict(
        self, target: Target, image: bytes, *, pixels: int, top_k: int, deadline: Deadline, context: RequestContext
    ) -> Entry:
        """The entry for one image: a prediction, or `{"error": {...}}` if it was refused.

        Raises:
            GatewayError: its row has no answer, or none in time.
        """
        key = (target.inference_url, target.model, target.version, top_k)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = BatchQueue(self._upstream, self._most_images, self._processes, top_k)
        call = PendingImage(image, pixels, deadline, context)
        if line.is_idle():
            await line.send([call], target)  # as part of this task: one of its own costs turns of the loop
        else:
            line.join(call, target)
            try:
                async with deadline.timeout():
                    await call.answer
            except TimeoutError as error:
                raise DeadlinePassed(deadline.timeout_s) from error
        answer = call.answer.result()
        if isinstance(answer, DeadlinePassed):  # the row's, whose time is that of the call with the most
            raise DeadlinePassed(deadline.timeout_s) from answer
        if isinstance(answer, Exception):
            raise answer
        return answer


class PendingImage:
    """One caller's image and where its entry, or its row's error, goes."""

    __slots__ = ("answer", "context", "deadline", "image", "pixels")

    def __init__(self, image: bytes, pixels: int, deadline: Deadline, context: RequestContext) -> None:
        self.image = image
        self.pixels = pixels
        self.deadline = deadline
        self.context = context
        self.answer: asyncio.Future[Entry | Exception] = asyncio.get_running_loop().create_future()


class BatchQueue:
    """The calls with one target and one `top_k`: those who wait, and the rows on their way."""

    def __init__(self, upstream: TorchServe, most_images: int, processes: int, top_k: int) -> None:
        self._upstream = upstream
        self._most_images = most_images
        self._processes = processes
        self._top_k = top_k
        self._waiting: deque[PendingImage] = deque()
        self._rows: set[asyncio.Task[None]] = set()
        self._stalled: set[asyncio.Task[None]] = set()

    def is_idle(self) -> bool:
        """Whether nobody waits and no row is on its way."""
        return not self._waiting and not self._rows

    def join(self, call: PendingImage, target: Target) -> None:
        """Sees to it that `call` gets an answer, with others where there are any."""
        self._waiting.append(call)
        # Not at once: others whose requests were read in the same turn of the loop shall go along.
        asyncio.get_running_loop().call_soon(self._send_rows, target)

    def _send_rows(self, target: Target) -> None:
        share = math.ceil(target.workers / self._processes)
        while len(self._rows) < share and (calls := self._next_row()):
            self._rows.add(asyncio.create_task(self.send(calls, target)))

    def _next_row(self) -> list[PendingImage]:
        """Those of the waiting who go together, first come first served."""
        calls: list[PendingImage] = []
        size = pixels = 0
        while self._waiting and len(calls) < self._most_images:
            call = self._waiting[0]
            if not call.answer.done():  # else its caller has left
                size += len(call.image)
                pixels += call.pixels
                if calls and (size > MAX_SHARED_BYTES or pixels > LARGE_PIXELS):
                    break
                calls.append(call)
            self._waiting.popleft()
        return calls

    async def send(self, calls: Sequence[PendingImage], target: Target) -> None:
        """Sends a row and gives each of its calls its answer; the current task stands for it, and sends no other."""
        row = asyncio.current_task()
        assert row is not None  # noqa: S101 — coroutines run in tasks
        self._rows.add(row)
        timer = asyncio.get_running_loop().call_later(STALLED_S, self._let_pass, row, target)
        answers: Sequence[Entry | Exception] = []
        try:
            answers = await self._ask(calls, target)
        except Exception as error:  # noqa: BLE001 — each caller raises it for itself
            answers = [error] * len(calls)
        finally:
            timer.cancel()
            self._rows.discard(row)
            self._stalled.discard(row)
            # Before the callers have their answers: the model need not wait until these are written.
            self._send_rows(target)
        for call, answer in zip(calls, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(answer)

    async def _ask(self, calls: Sequence[PendingImage], target: Target) -> list[Entry]:
        first = calls[0].context
        for call in calls[1:]:
            call.context.row = first.request_id
        return await self._upstream.predict(
            target,
            [call.image for call in calls],
            carried=first.carried(),
            deadline=max((call.deadline for call in calls), key=lambda deadline: deadline.at),
            top_k=self._top_k,
        )

    def _let_pass(self, row: asyncio.Task[None], target: Target) -> None:
        """Counts a row that is away for long no more, so that others need not wait for it."""
        self._rows.discard(row)
        self._stalled.add(row)
        self._send_rows(target)
