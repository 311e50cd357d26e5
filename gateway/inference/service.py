"""The inference service: for each call it chooses the version, takes a place and calls TorchServe.

It knows nothing of the routes and of HTTP requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from contracts import wire
from gateway.errors import DeadlinePassed, EngineBroke, GatewayError, Unavailable
from gateway.inference.answer import Answer, Call, Progress
from gateway.inference.batching import DynamicBatcher
from gateway.inference.image_header import LARGE_PIXELS, count_pixels
from gateway.inference.torchserve import raise_for_error, translate_entry
from gateway.inference.turns import Turns
from gateway.refusals import ImageTooLarge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from contracts.wire import Entry, Options
    from gateway.inference.admission import ConcurrencyLimiter, PixelBudget
    from gateway.inference.routing import Kind, Router, Target
    from gateway.inference.torchserve import TorchServe

Received = TypeVar("Received")
# Upstream batches of /predict/batch in flight for each ready worker: the one that it works on, and the next.
BATCHES_PER_WORKER = 2
# While single images arrive, neither large images nor the upstream batches of /predict/batch get the last worker. These
# batches then have at most this number of images, so that a single image waits only briefly if there is one worker.
SHORT_BATCH_IMAGES = 8
# Single images count as arriving for this number of seconds after the last one.
SINGLES_LAST_S = 2
# Large images that may wait for a turn in one process; they hold places while they wait.
MOST_LARGE_WAITING = 4


class InferenceService:
    """Predictions and explanations, each kind with its own places.

    A call gives its place back only when TorchServe has answered or the deadline has passed, even if the caller has
    disconnected: until then TorchServe works on it.
    """

    def __init__(
        self,
        router: Router,
        upstream: TorchServe,
        *,
        predict: ConcurrencyLimiter,
        explain: ConcurrencyLimiter,
        chunk_images: int,
        timeout_s: float,
        processes: int,
        max_pixels: int,
        pixels: PixelBudget,
    ) -> None:
        self.predict_limiter = predict
        self.explain_limiter = explain
        self._router = router
        self._upstream = upstream
        self._chunk_images = chunk_images
        self._timeout_s = timeout_s
        self._batcher = DynamicBatcher(upstream, chunk_images, processes)
        self._max_pixels = max_pixels
        self._pixels = pixels
        self._batch_turns = Turns()
        self._large_turns: dict[Kind, Turns] = {
            "predict": Turns(MOST_LARGE_WAITING),
            "explain": Turns(MOST_LARGE_WAITING),
        }
        self._last_single = -math.inf  # by the monotonic clock

    async def predict(self, image: bytes, *, top_k: int, call: Call) -> Answer:
        """Return the prediction for one image: `class`, `confidence` and `top` in its only entry; or its error."""
        progress = Progress(call)
        try:
            return progress.answer((await self._predict(image, top_k, progress),))
        except GatewayError as error:
            return progress.answer(error=error)

    async def _predict(self, image: bytes, top_k: int, progress: Progress) -> Entry:
        call = progress.call
        pixels = count_pixels(image, self._max_pixels)
        with self._choose("predict", progress) as target, self._pixels.hold(pixels, call.caller):
            with progress.stage("wait"):
                await self.predict_limiter.take(call.caller)
            try:
                with progress.stage("model"):
                    if pixels > LARGE_PIXELS:
                        (entry,) = await self._send_in_turn(target, [image], pixels, top_k, call)
                    else:
                        entry = await self._predict_shared(target, image, pixels, top_k, progress)
            finally:
                self.predict_limiter.give_back(1, call.caller)
        raise_for_error(entry)
        return entry

    async def _predict_shared(self, target: Target, image: bytes, pixels: int, top_k: int, progress: Progress) -> Entry:
        self._last_single = time.monotonic()

        async def send(to: Target) -> Entry:
            progress.batch_id = ""  # at a second try that of the first
            return await self._batcher.predict(to, image, pixels=pixels, top_k=top_k, progress=progress)

        return await self._send("predict", target, send)

    async def predict_batch(self, images: Sequence[bytes], *, top_k: int, call: Call) -> Answer:
        """Return one entry per image, in order: a prediction, or `{"error": {…}}` as a caller gets it.

        The images are sent in several upstream batches that keep all ready workers busy. If one of these fails, only
        its own images have an error; an image that is too large is the only one that has an error. The answer has an
        error if no upstream batch was answered, or if the images together have too many pixels.
        """
        progress = Progress(call)
        try:
            return progress.answer(await self._predict_images(images, top_k, progress))
        except GatewayError as error:
            return progress.answer(error=error)

    async def _predict_images(self, images: Sequence[bytes], top_k: int, progress: Progress) -> Sequence[Entry]:
        entries: list[Entry] = [{}] * len(images)
        pixels: dict[int, int] = {}
        for index, image in enumerate(images):
            try:
                pixels[index] = count_pixels(image, self._max_pixels)
            except ImageTooLarge as error:
                entries[index] = error_entry(error)
        with self._choose("predict", progress) as target:
            if pixels:
                with self._pixels.hold(sum(pixels.values()), progress.call.caller):
                    sent = [images[index] for index in pixels]
                    answers = await self._predict_batch(target, sent, list(pixels.values()), top_k, progress)
                for index, answer in zip(pixels, answers, strict=True):
                    entries[index] = answer
        return entries

    async def _predict_batch(
        self, target: Target, images: Sequence[bytes], pixels: Sequence[int], top_k: int, progress: Progress
    ) -> list[Entry]:
        call = progress.call
        batches = list(split_images(images, pixels, self._images_per_batch(len(images), target)))
        entries: list[Entry] = [{}] * len(images)
        failures: list[GatewayError] = []
        waiting = iter(batches)

        async def send_batches() -> None:
            for first, last in waiting:
                try:
                    answers = await self._send_in_turn(target, images[first:last], sum(pixels[first:last]), top_k, call)
                    entries[first:last] = [publish(answer) for answer in answers]
                except GatewayError as error:
                    failures.append(error)
                    entries[first:last] = [error_entry(error)] * (last - first)

        with progress.stage("wait"):
            await self.predict_limiter.take(call.caller)
        # Several at once only if places are free now: a call does not wait for places after some of its work is done.
        most = min(target.workers * BATCHES_PER_WORKER, len(batches))
        places = 1 + self.predict_limiter.take_free(most - 1, call.caller)
        try:
            with progress.stage("model"):
                await asyncio.gather(*(send_batches() for _ in range(places)))
        finally:
            self.predict_limiter.give_back(places, call.caller)
        if len(failures) == len(batches):
            raise failures[0]
        return entries

    async def explain(self, image: bytes, *, options: Options, call: Call) -> Answer:
        """Return the overlay, or with the option `format: json` the heatmap's entry; or the call's error."""
        progress = Progress(call)
        try:
            received = await self._explain(image, options, progress)
        except GatewayError as error:
            return progress.answer(error=error)
        return progress.answer(overlay=received) if isinstance(received, bytes) else progress.answer((received,))

    async def _explain(self, image: bytes, options: Options, progress: Progress) -> bytes | Entry:
        call = progress.call
        pixels = count_pixels(image, self._max_pixels)
        send = partial(
            self._upstream.explain, image=image, carried=call.carried, deadline=call.deadline, options=options
        )
        with self._choose("explain", progress) as target, self._pixels.hold(pixels, call.caller):
            with progress.stage("wait"):
                await self.explain_limiter.take(call.caller)
            try:
                with progress.stage("model"):
                    if pixels <= LARGE_PIXELS:
                        return await self._send("explain", target, send)
                    workers = partial(self._router.workers, "explain", target)
                    async with self._large_turns["explain"].turn(lambda: max(1, workers() - 1), call.deadline):
                        return await self._send("explain", target, send)
            finally:
                self.explain_limiter.give_back(1, call.caller)

    def _choose(self, kind: Kind, progress: Progress) -> Target:
        call = progress.call
        left_s = call.deadline.left_s()
        if left_s <= 0:
            raise DeadlinePassed(call.deadline.timeout_s)
        progress.is_hurried = left_s < self._timeout_s / 2
        target = self._router.choose(kind, call.version, call.key_name, call.model)
        progress.model, progress.version = target.model, target.version
        return target

    async def _send_in_turn(
        self, target: Target, images: Sequence[bytes], pixels: int, top_k: int, call: Call
    ) -> list[Entry]:
        """Wait for a turn, then send an upstream batch of /predict/batch, or a large image."""
        is_large = pixels > LARGE_PIXELS
        turns = self._large_turns["predict"] if is_large else self._batch_turns
        most = partial(self._most_in_flight, target, 1 if is_large else BATCHES_PER_WORKER)
        async with turns.turn(most, call.deadline):
            return await self._send_batch(target, images, top_k, call)

    def _most_in_flight(self, target: Target, per_worker: int) -> int:
        """Return the number of batches, or large images, that may be in flight; single images keep one worker."""
        workers = self._router.workers("predict", target)
        return max(1, workers - 1) if self._singles_arrive() else workers * per_worker

    def _singles_arrive(self) -> bool:
        """Return True if a single image, which is not large, came in the last `SINGLES_LAST_S`."""
        return time.monotonic() - self._last_single < SINGLES_LAST_S

    async def _send_batch(self, target: Target, images: Sequence[bytes], top_k: int, call: Call) -> list[Entry]:
        send = partial(self._upstream.predict, images=images, carried=call.carried, deadline=call.deadline, top_k=top_k)
        with target:  # counted in flight once per upstream batch, so that the least loaded replica is found
            return await self._send("predict", target, send)

    async def _send(self, kind: Kind, target: Target, send: Callable[[Target], Awaitable[Received]]) -> Received:
        """Return the result of `send` for `target`, or for another replica if `target` refused before any work began.

        Raises:
            GatewayError: the call failed; if the first replica refused it, on the second one too.
        """
        try:
            return await send(target)
        except EngineBroke:
            self._router.set_aside(target, is_lost=True)
            raise
        except Unavailable as error:
            self._router.set_aside(target, is_lost=error.code == "not_ready")
            another = self._router.choose_another(kind, target)
            if another is None:
                raise
        with another:
            return await send(another)

    def _images_per_batch(self, count: int, target: Target) -> int:
        """Return the images per upstream batch that give each free worker one; busy workers get one long batch."""
        free = max(1, target.workers - self.predict_limiter.taken)
        most = min(self._chunk_images, SHORT_BATCH_IMAGES) if self._singles_arrive() else self._chunk_images
        return min(most, math.ceil(count / free))


def split_images(images: Sequence[bytes], pixels: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of each upstream batch `images[first:last]`.

    It has at most `most` images, which fit into one request to TorchServe and have at most `LARGE_PIXELS` together; a
    larger image is alone.
    """
    first = size = batch_pixels = 0
    for index, image in enumerate(images):
        framed = len(image) + wire.FRAME_HEAD_BYTES
        is_full = size + framed > wire.MAX_REQUEST_BYTES or batch_pixels + pixels[index] > LARGE_PIXELS
        if index > first and (index - first == most or is_full):
            yield first, index
            first, size, batch_pixels = index, 0, 0
        size += framed
        batch_pixels += pixels[index]
    yield first, len(images)


def publish(entry: Entry) -> Entry:
    """Return the handler's entry as a caller gets it."""
    return error_entry(translate_entry(entry)) if "error" in entry else entry


def error_entry(error: GatewayError) -> Entry:
    """Return the entry of an image that failed: status, code, detail and facts of the error."""
    return {"error": {"status": error.status, "code": error.code, "detail": error.detail, **error.facts}}
