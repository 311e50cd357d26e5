"""Images in, entries out: chooses the version, takes a place, calls TorchServe. Knows nothing of HTTP's routes."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from contracts import wire
from gateway.errors import DeadlinePassed, GatewayError, Unavailable
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
# Rows of a batch in flight for each ready worker: one that it works on, and the next.
ROWS_PER_WORKER = 2
# While single images come, neither rows of batches nor large images get the last worker, and rows have so few images
# that where there is but one worker, a single image waits for a moment only. A single image counts for so many seconds.
SHORT_ROW_IMAGES = 8
SINGLES_LAST_S = 2
# Large images that wait for a turn in one process: they hold places meanwhile.
MOST_LARGE_WAITING = 4


class SharedState:
    """What the gateway's processes tell each other about their inference; made before they are forked."""

    def __init__(self) -> None:
        self.places = SharedCounters()
        self.last_single = SharedCounters()  # in seconds of the monotonic clock, which is the same for all
        self.turns = {kind: (SharedCounters(), SharedCounters()) for kind in ("rows", "predict", "explain")}

    def leave(self, seat: int) -> None:
        """Forget what the process on `seat` told."""
        for counters in (self.places, self.last_single, *(each for pair in self.turns.values() for each in pair)):
            counters.leave(seat)


@dataclass(frozen=True)
class Ask:
    """What every call carries: who asks, until when, and for which version (None: whose turn it is)."""

    context: RequestContext
    deadline: Deadline
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What one version of a model answered to a call.

    Attributes:
        model: the model's name.
        version: its version.
        entries: one per image, in order, as a caller gets them; none beside an overlay.
        overlay: the PNG bytes of an explanation that was asked for as an image.
    """

    model: str
    version: str
    entries: Sequence[Entry] = ()
    overlay: bytes | None = None


class InferenceService:
    """Predictions and explanations, each kind within its own places.

    A place is given back only when TorchServe has answered or the deadline has passed, also when the caller has gone:
    until then TorchServe works for it.
    """

    def __init__(
        self,
        versions: Router,
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
        self._versions = versions
        self._upstream = upstream
        self._chunk_images = chunk_images
        self._timeout_s = timeout_s
        self._shared = DynamicBatcher(upstream, chunk_images, processes)
        self._max_pixels = max_pixels
        self._pixels = pixels
        self._row_turns = Turns()
        self._large_turns: dict[Kind, Turns] = {
            "predict": Turns(MOST_LARGE_WAITING),
            "explain": Turns(MOST_LARGE_WAITING),
        }
        self.join(SharedState(), seat=0)

    def join(self, shared: SharedState, seat: int) -> None:
        """Tell the other gateway processes what is in flight here, and learn what is there."""
        self.predict_limiter.on_change = partial(shared.places.tell, seat)
        self._taken_elsewhere = partial(shared.places.sum_of_others, seat)
        self._row_turns.join(*shared.turns["rows"], seat)
        for kind, turns in self._large_turns.items():
            turns.join(*shared.turns[kind], seat)
        self._last_single, self._seat = shared.last_single, seat

    async def predict(self, image: bytes, *, top_k: int, ask: Ask) -> Answer:
        """Return the prediction for one image: `class`, `confidence` and `top` in its only entry.

        Raises:
            GatewayError: there is none.
        """
        pixels = count_pixels(image, self._max_pixels)
        client = ask.context.client
        with self._choose("predict", ask) as target, self._pixels.hold(pixels, client):
            with ask.context.stage("wait"):
                await self.predict_limiter.take(client)
            try:
                with ask.context.stage("model"):
                    if pixels > LARGE_PIXELS:
                        (entry,) = await self._turn_and_row(target, [image], pixels, top_k, ask)
                    else:
                        entry = await self._predict_shared(target, image, pixels, top_k, ask)
            finally:
                self.predict_limiter.give_back(1, client)
        raise_for_error(entry)
        return Answer(target.model, target.version, (entry,))

    async def _predict_shared(self, target: Target, image: bytes, pixels: int, top_k: int, ask: Ask) -> Entry:
        self._last_single.tell(self._seat, int(time.monotonic()))
        send = partial(
            self._shared.predict, image=image, pixels=pixels, top_k=top_k, deadline=ask.deadline, context=ask.context
        )
        return await self._send("predict", target, send, ask)

    async def predict_batch(self, images: Sequence[bytes], *, top_k: int, ask: Ask) -> Answer:
        """Return one entry per image, in order: a prediction, or `{"error": {…}}` as a caller gets it.

        The images travel in rows that keep all ready workers busy. A row that fails costs its own images only, and an
        image that is too large only itself.

        Raises:
            GatewayError: no row was answered, or the images have too many pixels together.
        """
        entries: list[Entry] = [{}] * len(images)
        pixels: dict[int, int] = {}
        for index, image in enumerate(images):
            try:
                pixels[index] = count_pixels(image, self._max_pixels)
            except ImageTooLarge as error:
                entries[index] = error_entry(error)
        with self._choose("predict", ask) as target:
            if pixels:
                with self._pixels.hold(sum(pixels.values()), ask.context.client):
                    sent = [images[index] for index in pixels]
                    answers = await self._predict_batch(target, sent, list(pixels.values()), top_k, ask)
                for index, answer in zip(pixels, answers, strict=True):
                    entries[index] = answer
        # For the log and the metrics: the call is answered, but the version has failed it.
        faults = (entry["error"] for entry in entries if "error" in entry)
        ask.context.code = next((fault["code"] for fault in faults if fault["status"] >= 500), "")
        return Answer(target.model, target.version, entries)

    async def _predict_batch(
        self, target: Target, images: Sequence[bytes], pixels: Sequence[int], top_k: int, ask: Ask
    ) -> list[Entry]:
        rows = list(cut_rows(images, pixels, self._images_a_row(len(images), target)))
        client = ask.context.client
        entries: list[Entry] = [{}] * len(images)
        failures: list[GatewayError] = []
        waiting = iter(rows)

        async def send_rows() -> None:
            for first, last in waiting:
                try:
                    answers = await self._turn_and_row(target, images[first:last], sum(pixels[first:last]), top_k, ask)
                    entries[first:last] = [publish(answer) for answer in answers]
                except GatewayError as error:
                    failures.append(error)
                    entries[first:last] = [error_entry(error)] * (last - first)

        with ask.context.stage("wait"):
            await self.predict_limiter.take(client)
        # More rows at once only as far as places are free now: a batch never waits with some of its work done.
        lanes = 1 + self.predict_limiter.take_free(min(target.workers * ROWS_PER_WORKER, len(rows)) - 1, client)
        try:
            with ask.context.stage("model"):
                await asyncio.gather(*(send_rows() for _ in range(lanes)))
        finally:
            self.predict_limiter.give_back(lanes, client)
        if len(failures) == len(rows):
            raise failures[0]
        return entries

    async def explain(self, image: bytes, *, options: Options, ask: Ask) -> Answer:
        """Return the overlay, or with the option `format: json` the heatmap's entry.

        Raises:
            GatewayError: there is none.
        """
        pixels = count_pixels(image, self._max_pixels)
        client = ask.context.client
        send = partial(
            self._upstream.explain,
            image=image,
            carried=ask.context.carried(),
            deadline=ask.deadline,
            options=options,
        )
        with self._choose("explain", ask) as target, self._pixels.hold(pixels, client):
            with ask.context.stage("wait"):
                await self.explain_limiter.take(client)
            try:
                with ask.context.stage("model"):
                    if pixels <= LARGE_PIXELS:
                        received = await self._send("explain", target, send, ask)
                    else:
                        workers = partial(self._versions.workers, "explain", target.version)
                        async with self._large_turns["explain"].turn(lambda: max(1, workers() - 1), ask.deadline):
                            received = await self._send("explain", target, send, ask)
            finally:
                self.explain_limiter.give_back(1, client)
        if isinstance(received, bytes):
            return Answer(target.model, target.version, overlay=received)
        return Answer(target.model, target.version, (received,))

    def _choose(self, kind: Kind, ask: Ask) -> Target:
        left_s = ask.deadline.left_s()
        if left_s <= 0:
            raise DeadlinePassed(ask.deadline.timeout_s)
        ask.context.is_hurried = left_s < self._timeout_s / 2
        target = self._versions.choose(kind, ask.version, ask.context.caller)
        ask.context.model, ask.context.version = target.model, target.version
        return target

    async def _turn_and_row(
        self, target: Target, images: Sequence[bytes], pixels: int, top_k: int, ask: Ask
    ) -> list[Entry]:
        """Send a batch's row, or a large image, when it is its turn."""
        is_large = pixels > LARGE_PIXELS
        turns = self._large_turns["predict"] if is_large else self._row_turns
        most = partial(self._most_on_their_way, target.version, 1 if is_large else ROWS_PER_WORKER)
        async with turns.turn(most, ask.deadline):
            return await self._row(target, images, top_k, ask)

    def _most_on_their_way(self, version: str, a_worker: int) -> int:
        """Return how many rows, or large images, may be at TorchServe: one worker is left to single ones."""
        workers = self._versions.workers("predict", version)
        return max(1, workers - 1) if self._singles_come() else workers * a_worker

    def _singles_come(self) -> bool:
        """Return True if some gateway process has lately got a single image that is not large."""
        return time.monotonic() - self._last_single.largest() < SINGLES_LAST_S

    async def _row(self, target: Target, images: Sequence[bytes], top_k: int, ask: Ask) -> list[Entry]:
        send = partial(
            self._upstream.predict, images=images, carried=ask.context.carried(), deadline=ask.deadline, top_k=top_k
        )
        with target:  # once more for each row: a batch weighs as much as it has
            return await self._send("predict", target, send, ask)

    async def _send(
        self, kind: Kind, target: Target, send: Callable[[Target], Awaitable[Received]], ask: Ask
    ) -> Received:
        """Return what `send` gets from `target`; from another replica where this one refused before any work began.

        Raises:
            GatewayError: there is no answer, nor from a second replica.
        """
        try:
            return await send(target)
        except Unavailable:
            another = self._versions.choose_another(kind, target)
            if another is None:
                raise
        ask.context.row = ""
        with another:
            return await send(another)

    def _images_a_row(self, count: int, target: Target) -> int:
        """Such that there are as many rows as free workers: to busy ones, one long row costs less than two."""
        free = max(1, target.workers - self.predict_limiter.taken - self._taken_elsewhere())
        most = min(self._chunk_images, SHORT_ROW_IMAGES) if self._singles_come() else self._chunk_images
        return min(most, math.ceil(count / free))


def cut_rows(images: Sequence[bytes], pixels: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """The batch as rows `images[first:last]` of at most `most` images that fit into one body; a large image goes alone.

    The images of a row have at most `LARGE_PIXELS` together.
    """
    first = size = row_pixels = 0
    for index, image in enumerate(images):
        framed = len(image) + wire.FRAME_HEAD_BYTES
        is_full = size + framed > wire.MAX_REQUEST_BYTES or row_pixels + pixels[index] > LARGE_PIXELS
        if index > first and (index - first == most or is_full):
            yield first, index
            first, size, row_pixels = index, 0, 0
        size += framed
        row_pixels += pixels[index]
    yield first, len(images)


def publish(entry: Entry) -> Entry:
    """The handler's entry as a caller gets it."""
    return error_entry(translate_entry(entry)) if "error" in entry else entry


def error_entry(error: GatewayError) -> Entry:
    """The entry of an image that has no answer: the problem's members that vary."""
    return {"error": {"status": error.status, "code": error.code, "detail": error.detail, **error.facts}}
