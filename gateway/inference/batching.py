"""Dynamic batching: single images of several callers are sent to TorchServe as one upstream batch.

For TorchServe and the handler a request costs more than a small image in it. So all gateway processes together keep
about as many upstream batches in flight as the version has workers. While there are fewer an image is sent at once. If
there are as many it waits until one has been answered, and is sent together with all images that wait by then.

No caller gets another caller's answer: an upstream batch has images of one target and one `top_k`, its entries are
assigned by position, and an answer with another number of entries is an error. Each call keeps its own deadline. The
upstream batch has the latest of these, and leaves out the images of callers that have disconnected.
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
    from gateway.inference.answer import Progress
    from gateway.inference.routing import Target
    from gateway.inference.torchserve import TorchServe

# A larger image is sent alone, because the others would wait while it is copied and decoded.
MAX_SHARED_BYTES = 256 * 1024
# After this time an upstream batch no longer counts as in flight, so that images do not wait for a lost one.
STALLED_S = 0.5


class DynamicBatcher:
    """Sends images to `upstream` in batches of at most `most_images`, as one of `processes` gateway processes."""

    def __init__(self, upstream: TorchServe, most_images: int, processes: int) -> None:
        self._upstream = upstream
        self._most_images = most_images
        self._processes = processes
        # Weak, so that a queue is dropped when no image waits in it and none of its upstream batches is in flight.
        self._queues: WeakValueDictionary[tuple[str, str, str, int], BatchQueue] = WeakValueDictionary()

    async def predict(self, target: Target, image: bytes, *, pixels: int, top_k: int, progress: Progress) -> Entry:
        """Return the entry for one image: a prediction, or `{"error": {...}}` if it was refused.

        Raises:
            GatewayError: its upstream batch failed, or was not answered before the deadline.
        """
        key = (target.inference_url, target.model, target.version, top_k)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = BatchQueue(self._upstream, self._most_images, self._processes, top_k)
        pending = PendingImage(image, pixels, progress)
        if queue.is_idle():
            await queue.send([pending], target)  # in this task: a task of its own costs iterations of the event loop
        else:
            queue.join(pending, target)
            try:
                async with pending.deadline.timeout():
                    await pending.answer
            except TimeoutError as error:
                raise DeadlinePassed(pending.deadline.timeout_s) from error
        answer = pending.answer.result()
        if isinstance(answer, DeadlinePassed):  # it names the deadline of the upstream batch, not that of this call
            raise DeadlinePassed(pending.deadline.timeout_s) from answer
        if isinstance(answer, Exception):
            raise answer
        return answer


class PendingImage:
    """One caller's image, and the future for its entry or for the error of its upstream batch."""

    __slots__ = ("answer", "carried", "deadline", "image", "pixels", "progress")

    def __init__(self, image: bytes, pixels: int, progress: Progress) -> None:
        self.image = image
        self.pixels = pixels
        self.deadline = progress.call.deadline
        self.carried = progress.call.carried
        self.progress = progress
        self.answer: asyncio.Future[Entry | Exception] = asyncio.get_running_loop().create_future()


class BatchQueue:
    """The images with one target and one `top_k`: those that wait, and the upstream batches in flight."""

    def __init__(self, upstream: TorchServe, most_images: int, processes: int, top_k: int) -> None:
        self._upstream = upstream
        self._most_images = most_images
        self._processes = processes
        self._top_k = top_k
        self._waiting: deque[PendingImage] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._stalled: set[asyncio.Task[None]] = set()

    def is_idle(self) -> bool:
        """Return True if no image waits and no upstream batch is in flight."""
        return not self._waiting and not self._in_flight

    def join(self, call: PendingImage, target: Target) -> None:
        """Queue `call`, and send it with other images when an upstream batch may be sent."""
        self._waiting.append(call)
        # Not at once, so that images whose requests were read in the same iteration of the event loop are sent too.
        asyncio.get_running_loop().call_soon(self._send_batches, target)

    def _send_batches(self, target: Target) -> None:
        share = math.ceil(target.workers / self._processes)
        while len(self._in_flight) < share and (calls := self._next_batch()):
            self._in_flight.add(asyncio.create_task(self.send(calls, target)))

    def _next_batch(self) -> list[PendingImage]:
        """Remove the images of the next upstream batch from the queue, in order, and return them."""
        calls: list[PendingImage] = []
        size = pixels = 0
        while self._waiting and len(calls) < self._most_images:
            call = self._waiting[0]
            if not call.answer.done():  # otherwise its caller has disconnected
                size += len(call.image)
                pixels += call.pixels
                if calls and (size > MAX_SHARED_BYTES or pixels > LARGE_PIXELS):
                    break
                calls.append(call)
            self._waiting.popleft()
        return calls

    async def send(self, calls: Sequence[PendingImage], target: Target) -> None:
        """Send one upstream batch and give each call its answer; the current task represents the batch in flight."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 — coroutines run in tasks
        self._in_flight.add(task)
        timer = asyncio.get_running_loop().call_later(STALLED_S, self._mark_stalled, task, target)
        answers: Sequence[Entry | Exception] = []
        try:
            answers = await self._ask(calls, target)
        except Exception as error:  # noqa: BLE001 — `predict` raises it in the task of each caller
            answers = [error] * len(calls)
        finally:
            timer.cancel()
            self._in_flight.discard(task)
            self._stalled.discard(task)
            # Before the callers get their answers, so that the model does not wait until these are written.
            self._send_batches(target)
        for call, answer in zip(calls, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(answer)

    async def _ask(self, calls: Sequence[PendingImage], target: Target) -> list[Entry]:
        first = calls[0].carried
        for call in calls[1:]:
            call.progress.batch_id = first.id
        return await self._upstream.predict(
            target,
            [call.image for call in calls],
            carried=first,
            deadline=max((call.deadline for call in calls), key=lambda deadline: deadline.at),
            top_k=self._top_k,
        )

    def _mark_stalled(self, task: asyncio.Task[None], target: Target) -> None:
        """Stop counting an upstream batch as in flight, so that other images do not wait for it."""
        self._in_flight.discard(task)
        self._stalled.add(task)
        self._send_batches(target)
