"""Dynamic batching: single images of several callers are sent to TorchServe as one upstream batch.

For TorchServe and the handler a request costs more than a small image in it. So all gateway processes together keep
about as many upstream batches in flight as the version has workers; the agent tells each process how many others have
calls in flight there. While there are fewer an image is sent at once. If
there are as many it waits until one has been answered, and is sent together with all images that wait by then.

Predictions and explanations in the forward pass share upstream batches: each image has its own options.

No caller gets another caller's answer: an upstream batch has images of one target and one `top_k`, its entries are
assigned by position, and an answer with another number of entries is an error. Each call keeps its own deadline. The
upstream batch has the latest of these, and leaves out the images of callers that have disconnected.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from contracts import wire
from gateway.errors import DeadlinePassed
from gateway.inference.image_header import LARGE_PIXELS
from gateway.inference.questions import share_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.wire import Entry, ImageOptions, Options
    from gateway.inference.answer import Progress
    from gateway.inference.questions import Share
    from gateway.inference.routing import Target
    from gateway.inference.torchserve import Deadline, TorchServe

# A larger image is sent alone, because the others would wait while it is copied and decoded.
MAX_SHARED_BYTES = 256 * 1024
# After this time an upstream batch no longer counts as in flight, so that images do not wait for a lost one.
STALLED_S = 0.5
# Of the options header, for the options that are not an image's: id, deadline, trace context, `top_k`.
COMMON_OPTIONS_BYTES = 400
# Explanations together have about half of the bytes that an answer may have, because their sizes are estimates.
MAX_SHARED_ANSWER_BYTES = wire.MAX_ANSWER_BYTES // 2


class DynamicBatcher:
    """Sends images to `upstream` in batches of at most `most_images`, as one of `processes` gateway processes."""

    def __init__(self, upstream: TorchServe, most_images: int, processes: int) -> None:
        self._upstream = upstream
        self._most_images = most_images
        self._processes = processes
        # Weak, so that a queue is dropped when no image waits in it and none of its upstream batches is in flight.
        self._queues: WeakValueDictionary[tuple[str, str, str, int], BatchQueue] = WeakValueDictionary()

    async def answer(self, target: Target, image: bytes, *, pixels: int, options: Options, progress: Progress) -> Entry:
        """Return the entry for one image: a prediction or an explanation, or `{"error": {...}}` if it was refused.

        Raises:
            GatewayError: its upstream batch failed, or was not answered before the deadline.
        """
        top_k = options.top_k
        key = (target.inference_url, target.model, target.version, top_k)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = BatchQueue(self._upstream, self._most_images, self._processes, top_k)
        own = options.images[0] if options.images else wire.PREDICT
        pending = PendingImage(image, pixels, own, share_of(own, target.contract), progress)
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


def _future() -> asyncio.Future[Entry | Exception]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class PendingImage:
    """One caller's image with its options, and the future for its entry or for the error of its upstream batch."""

    image: bytes
    pixels: int
    options: ImageOptions
    share: Share
    progress: Progress
    answer: asyncio.Future[Entry | Exception] = field(default_factory=_future)

    @property
    def deadline(self) -> Deadline:
        """The moment until which the caller waits."""
        return self.progress.call.deadline


class Room:
    """The room that is left in an upstream batch of at most `most_images`: for bytes, pixels and forward passes."""

    def __init__(self, most_images: int) -> None:
        self._bytes = MAX_SHARED_BYTES
        self._pixels = LARGE_PIXELS
        self._header_bytes = wire.MAX_OPTIONS_BYTES - COMMON_OPTIONS_BYTES
        self._answer_bytes = MAX_SHARED_ANSWER_BYTES
        self._passes = most_images

    def take(self, call: PendingImage) -> bool:
        """Take the call's room, and return True if there was enough."""
        self._bytes -= len(call.image)
        self._pixels -= call.pixels
        self._header_bytes -= call.share.header_bytes
        self._answer_bytes -= call.share.answer_bytes
        self._passes -= call.share.passes
        return min(self._bytes, self._pixels, self._header_bytes, self._answer_bytes, self._passes) >= 0


def images_that_fit(share: Share, most_images: int) -> int:
    """Return the number of images, each with this share, that an upstream batch of `most_images` has room for."""
    return max(
        1,
        min(
            (wire.MAX_OPTIONS_BYTES - COMMON_OPTIONS_BYTES) // share.header_bytes,
            MAX_SHARED_ANSWER_BYTES // max(1, share.answer_bytes),
            most_images // share.passes,
        ),
    )


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
        share = math.ceil(target.workers / max(target.processes, self._processes))
        while len(self._in_flight) < share and (calls := self._next_batch()):
            self._in_flight.add(asyncio.create_task(self.send(calls, target)))

    def _next_batch(self) -> list[PendingImage]:
        """Remove the images of the next upstream batch from the queue, in order, and return them."""
        calls: list[PendingImage] = []
        room = Room(self._most_images)
        while self._waiting and len(calls) < self._most_images:
            call = self._waiting[0]
            if not call.answer.done():  # otherwise its caller has disconnected
                if not room.take(call) and calls:
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
        first = calls[0].progress.call.carried
        for call in calls[1:]:
            call.progress.batch_id = first.id
        return await self._upstream.predict(
            target,
            [call.image for call in calls],
            carried=first,
            deadline=max((call.deadline for call in calls), key=lambda deadline: deadline.at),
            top_k=self._top_k,
            each=tuple(call.options for call in calls) if any(call.options.explain for call in calls) else (),
        )

    def _mark_stalled(self, task: asyncio.Task[None], target: Target) -> None:
        """Stop counting an upstream batch as in flight, so that other images do not wait for it."""
        self._in_flight.discard(task)
        self._stalled.add(task)
        self._send_batches(target)
