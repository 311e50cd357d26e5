"""Images in, entries out: chooses the version, takes a place, calls TorchServe. Knows nothing of HTTP's routes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from contracts import wire
from gateway.errors import DeadlinePassed, GatewayError, Unavailable
from gateway.inference.batching import DynamicBatcher
from gateway.inference.torchserve import raise_for_error, translate_entry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from contracts.wire import Entry, Options
    from gateway.inference.admission import ConcurrencyLimiter
    from gateway.inference.routing import Kind, Router, Target
    from gateway.inference.torchserve import Deadline, TorchServe
    from gateway.request_context import RequestContext
    from gateway.server.shared_counters import SharedCounters

Answer = TypeVar("Answer")
# Rows of a batch in flight for each ready worker: one that it works on, and the next.
ROWS_PER_WORKER = 2


@dataclass(frozen=True)
class Ask:
    """What every call carries: who asks, until when, and for which version (None: whose turn it is)."""

    context: RequestContext
    deadline: Deadline
    version: str | None = None


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
    ) -> None:
        self.predict_limiter = predict
        self.explain_limiter = explain
        self._versions = versions
        self._upstream = upstream
        self._chunk_images = chunk_images
        self._timeout_s = timeout_s
        self._shared = DynamicBatcher(upstream, chunk_images, processes)
        self._taken_elsewhere: Callable[[], int] = lambda: 0

    def join(self, counters: SharedCounters, seat: int) -> None:
        """Tells the other gateway processes how many predict places are taken here, and learns how many are there."""
        self.predict_limiter.on_change = partial(counters.tell, seat)
        self._taken_elsewhere = partial(counters.sum_of_others, seat)

    async def predict(self, image: bytes, *, top_k: int, ask: Ask) -> Entry:
        """The prediction for one image: `class`, `confidence` and `top`.

        Raises:
            GatewayError: there is none.
        """
        with self._choose("predict", ask) as target:
            with ask.context.stage("wait"):
                await self.predict_limiter.take()
            try:
                with ask.context.stage("model"):
                    send = partial(
                        self._shared.predict, image=image, top_k=top_k, deadline=ask.deadline, context=ask.context
                    )
                    entry = await self._send("predict", target, send, ask)
            finally:
                self.predict_limiter.give_back(1)
        raise_for_error(entry)
        return entry

    async def predict_batch(self, images: Sequence[bytes], *, top_k: int, ask: Ask) -> list[Entry]:
        """One entry per image, in order: a prediction, or `{"error": {…}}` as a caller gets it.

        The images travel in rows that keep all ready workers busy. A row that fails costs its own images only.

        Raises:
            GatewayError: no row was answered.
        """
        with self._choose("predict", ask) as target:
            return await self._predict_batch(target, images, top_k, ask)

    async def _predict_batch(self, target: Target, images: Sequence[bytes], top_k: int, ask: Ask) -> list[Entry]:
        rows = list(cut_rows(images, self._images_a_row(len(images), target)))
        entries: list[Entry] = [{}] * len(images)
        failures: list[GatewayError] = []
        waiting = iter(rows)

        async def send_rows() -> None:
            for first, last in waiting:
                try:
                    answers = await self._row(target, images[first:last], top_k, ask)
                    entries[first:last] = [publish(answer) for answer in answers]
                except GatewayError as error:
                    failures.append(error)
                    entries[first:last] = [error_entry(error)] * (last - first)

        with ask.context.stage("wait"):
            await self.predict_limiter.take()
        # More rows at once only as far as places are free now: a batch never waits with some of its work done.
        lanes = 1 + self.predict_limiter.take_free(min(target.workers * ROWS_PER_WORKER, len(rows)) - 1)
        try:
            with ask.context.stage("model"):
                await asyncio.gather(*(send_rows() for _ in range(lanes)))
        finally:
            self.predict_limiter.give_back(lanes)
        if len(failures) == len(rows):
            raise failures[0]
        # For the log and the metrics: the call is answered, but the version has failed it.
        faults = (entry["error"] for entry in entries if "error" in entry)
        ask.context.code = next((fault["code"] for fault in faults if fault["status"] >= 500), "")
        return entries

    async def explain(self, image: bytes, *, options: Options, ask: Ask) -> bytes | Entry:
        """The overlay's PNG bytes, or with the option `format: json` the heatmap's entry.

        Raises:
            GatewayError: there is none.
        """
        with self._choose("explain", ask) as target:
            with ask.context.stage("wait"):
                await self.explain_limiter.take()
            try:
                with ask.context.stage("model"):
                    send = partial(
                        self._upstream.explain,
                        image=image,
                        carried=ask.context.carried(),
                        deadline=ask.deadline,
                        options=options,
                    )
                    return await self._send("explain", target, send, ask)
            finally:
                self.explain_limiter.give_back(1)

    def _choose(self, kind: Kind, ask: Ask) -> Target:
        left_s = ask.deadline.left_s()
        if left_s <= 0:
            raise DeadlinePassed(ask.deadline.timeout_s)
        ask.context.is_hurried = left_s < self._timeout_s / 2
        target = self._versions.choose(kind, ask.version, ask.context.caller)
        ask.context.model, ask.context.version = target.model, target.version
        return target

    async def _row(self, target: Target, images: Sequence[bytes], top_k: int, ask: Ask) -> list[Entry]:
        send = partial(
            self._upstream.predict, images=images, carried=ask.context.carried(), deadline=ask.deadline, top_k=top_k
        )
        with target:  # once more for each row: a batch weighs as much as it has
            return await self._send("predict", target, send, ask)

    async def _send(self, kind: Kind, target: Target, send: Callable[[Target], Awaitable[Answer]], ask: Ask) -> Answer:
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
        return min(self._chunk_images, math.ceil(count / free))


def cut_rows(images: Sequence[bytes], most: int) -> Iterator[tuple[int, int]]:
    """The batch as rows `images[first:last]` of at most `most` images that fit into one body."""
    first = size = 0
    for index, image in enumerate(images):
        framed = len(image) + wire.FRAME_HEAD_BYTES
        if index > first and (index - first == most or size + framed > wire.MAX_REQUEST_BYTES):
            yield first, index
            first, size = index, 0
        size += framed
    yield first, len(images)


def publish(entry: Entry) -> Entry:
    """The handler's entry as a caller gets it."""
    return error_entry(translate_entry(entry)) if "error" in entry else entry


def error_entry(error: GatewayError) -> Entry:
    """The entry of an image that has no answer: the problem's members that vary."""
    return {"error": {"status": error.status, "code": error.code, "detail": error.detail, **error.facts}}
