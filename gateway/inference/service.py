"""The inference service: for each call it chooses the version, takes a place and calls TorchServe.

It knows nothing of the routes and of HTTP requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from contracts import wire
from gateway.errors import DeadlinePassed, EngineBroke, GatewayError, Unavailable
from gateway.inference.batching import DynamicBatcher
from gateway.inference.image_header import LARGE_PIXELS, count_pixels
from gateway.inference.torchserve import raise_for_error, translate_entry
from gateway.inference.turns import Turns
from gateway.refusals import ImageTooLarge
from gateway.server.shared_counters import SharedCounters

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from contracts.wire import Entry, Options
    from gateway.inference.admission import ConcurrencyLimiter, PixelBudget
    from gateway.inference.routing import Kind, Router, Target
    from gateway.inference.torchserve import Deadline, TorchServe
    from gateway.request_context import RequestContext

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


class SharedState:
    """The numbers that the gateway processes share about their calls; made before the processes are forked."""

    def __init__(self) -> None:
        self.places = SharedCounters()
        self.last_single = SharedCounters()  # in seconds of the monotonic clock, which is the same in all processes
        self.turns = {kind: (SharedCounters(), SharedCounters()) for kind in ("batches", "predict", "explain")}

    def clear(self, slot: int) -> None:
        """Remove the numbers of the process with this slot."""
        for counters in (self.places, self.last_single, *(each for pair in self.turns.values() for each in pair)):
            counters.clear(slot)


@dataclass(frozen=True)
class Call:
    """The facts that every call has: its request context, deadline and wanted version (None: the plan chooses)."""

    context: RequestContext
    deadline: Deadline
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one version of a model to a call.

    Attributes:
        model: the model's name.
        version: its version.
        entries: one per image, in order, as a caller gets them; empty if there is an overlay.
        overlay: the PNG bytes of an explanation, if the caller wanted an image.
    """

    model: str
    version: str
    entries: Sequence[Entry] = ()
    overlay: bytes | None = None


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
        self.join(SharedState(), slot=0)

    def join(self, shared: SharedState, slot: int) -> None:
        """Share the numbers of calls in flight with the other gateway processes; `slot` is that of this process."""
        self.predict_limiter.on_change = partial(shared.places.set, slot)
        self._taken_elsewhere = partial(shared.places.sum_of_others, slot)
        self._batch_turns.join(*shared.turns["batches"], slot)
        for kind, turns in self._large_turns.items():
            turns.join(*shared.turns[kind], slot)
        self._last_single, self._slot = shared.last_single, slot

    async def predict(self, image: bytes, *, top_k: int, call: Call) -> Answer:
        """Return the prediction for one image: `class`, `confidence` and `top` in its only entry.

        Raises:
            GatewayError: the call was refused or failed.
        """
        pixels = count_pixels(image, self._max_pixels)
        client = call.context.client
        with self._choose("predict", call) as target, self._pixels.hold(pixels, client):
            with call.context.stage("wait"):
                await self.predict_limiter.take(client)
            try:
                with call.context.stage("model"):
                    if pixels > LARGE_PIXELS:
                        (entry,) = await self._send_in_turn(target, [image], pixels, top_k, call)
                    else:
                        entry = await self._predict_shared(target, image, pixels, top_k, call)
            finally:
                self.predict_limiter.give_back(1, client)
        raise_for_error(entry)
        return Answer(target.model, target.version, (entry,))

    async def _predict_shared(self, target: Target, image: bytes, pixels: int, top_k: int, call: Call) -> Entry:
        self._last_single.set(self._slot, int(time.monotonic()))
        send = partial(
            self._batcher.predict, image=image, pixels=pixels, top_k=top_k, deadline=call.deadline, context=call.context
        )
        return await self._send("predict", target, send, call)

    async def predict_batch(self, images: Sequence[bytes], *, top_k: int, call: Call) -> Answer:
        """Return one entry per image, in order: a prediction, or `{"error": {…}}` as a caller gets it.

        The images are sent in several upstream batches that keep all ready workers busy. If one of these fails, only
        its own images have an error; an image that is too large is the only one that has an error.

        Raises:
            GatewayError: no upstream batch was answered, or the images together have too many pixels.
        """
        entries: list[Entry] = [{}] * len(images)
        pixels: dict[int, int] = {}
        for index, image in enumerate(images):
            try:
                pixels[index] = count_pixels(image, self._max_pixels)
            except ImageTooLarge as error:
                entries[index] = error_entry(error)
        with self._choose("predict", call) as target:
            if pixels:
                with self._pixels.hold(sum(pixels.values()), call.context.client):
                    sent = [images[index] for index in pixels]
                    answers = await self._predict_batch(target, sent, list(pixels.values()), top_k, call)
                for index, answer in zip(pixels, answers, strict=True):
                    entries[index] = answer
        # For the log and the metrics: the call is answered, but the version failed for some of its images.
        errors = (entry["error"] for entry in entries if "error" in entry)
        call.context.code = next((error["code"] for error in errors if error["status"] >= 500), "")
        return Answer(target.model, target.version, entries)

    async def _predict_batch(
        self, target: Target, images: Sequence[bytes], pixels: Sequence[int], top_k: int, call: Call
    ) -> list[Entry]:
        batches = list(split_images(images, pixels, self._images_per_batch(len(images), target)))
        client = call.context.client
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

        with call.context.stage("wait"):
            await self.predict_limiter.take(client)
        # Several at once only if places are free now: a call does not wait for places after some of its work is done.
        most = min(target.workers * BATCHES_PER_WORKER, len(batches))
        places = 1 + self.predict_limiter.take_free(most - 1, client)
        try:
            with call.context.stage("model"):
                await asyncio.gather(*(send_batches() for _ in range(places)))
        finally:
            self.predict_limiter.give_back(places, client)
        if len(failures) == len(batches):
            raise failures[0]
        return entries

    async def explain(self, image: bytes, *, options: Options, call: Call) -> Answer:
        """Return the overlay, or with the option `format: json` the heatmap's entry.

        Raises:
            GatewayError: the call was refused or failed.
        """
        pixels = count_pixels(image, self._max_pixels)
        client = call.context.client
        send = partial(
            self._upstream.explain,
            image=image,
            carried=call.context.carried(),
            deadline=call.deadline,
            options=options,
        )
        with self._choose("explain", call) as target, self._pixels.hold(pixels, client):
            with call.context.stage("wait"):
                await self.explain_limiter.take(client)
            try:
                with call.context.stage("model"):
                    if pixels <= LARGE_PIXELS:
                        received = await self._send("explain", target, send, call)
                    else:
                        workers = partial(self._router.workers, "explain", target.version)
                        async with self._large_turns["explain"].turn(lambda: max(1, workers() - 1), call.deadline):
                            received = await self._send("explain", target, send, call)
            finally:
                self.explain_limiter.give_back(1, client)
        if isinstance(received, bytes):
            return Answer(target.model, target.version, overlay=received)
        return Answer(target.model, target.version, (received,))

    def _choose(self, kind: Kind, call: Call) -> Target:
        left_s = call.deadline.left_s()
        if left_s <= 0:
            raise DeadlinePassed(call.deadline.timeout_s)
        call.context.is_hurried = left_s < self._timeout_s / 2
        target = self._router.choose(kind, call.version, call.context.caller)
        call.context.model, call.context.version = target.model, target.version
        return target

    async def _send_in_turn(
        self, target: Target, images: Sequence[bytes], pixels: int, top_k: int, call: Call
    ) -> list[Entry]:
        """Wait for a turn, then send an upstream batch of /predict/batch, or a large image."""
        is_large = pixels > LARGE_PIXELS
        turns = self._large_turns["predict"] if is_large else self._batch_turns
        most = partial(self._most_in_flight, target.version, 1 if is_large else BATCHES_PER_WORKER)
        async with turns.turn(most, call.deadline):
            return await self._send_batch(target, images, top_k, call)

    def _most_in_flight(self, version: str, per_worker: int) -> int:
        """Return the number of batches, or large images, that may be in flight; single images keep one worker."""
        workers = self._router.workers("predict", version)
        return max(1, workers - 1) if self._singles_arrive() else workers * per_worker

    def _singles_arrive(self) -> bool:
        """Return True if a gateway process got a single image, which is not large, in the last `SINGLES_LAST_S`."""
        return time.monotonic() - self._last_single.largest() < SINGLES_LAST_S

    async def _send_batch(self, target: Target, images: Sequence[bytes], top_k: int, call: Call) -> list[Entry]:
        send = partial(
            self._upstream.predict, images=images, carried=call.context.carried(), deadline=call.deadline, top_k=top_k
        )
        with target:  # counted in flight once per upstream batch, so that the least loaded replica is found
            return await self._send("predict", target, send, call)

    async def _send(
        self, kind: Kind, target: Target, send: Callable[[Target], Awaitable[Received]], call: Call
    ) -> Received:
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
        call.context.batch_id = ""
        with another:
            return await send(another)

    def _images_per_batch(self, count: int, target: Target) -> int:
        """Return the images per upstream batch that give each free worker one; busy workers get one long batch."""
        free = max(1, target.workers - self.predict_limiter.taken - self._taken_elsewhere())
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
