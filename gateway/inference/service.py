"""The inference service: for each call it chooses the version, takes a place and calls TorchServe.

It knows nothing of the routes and of HTTP requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from contracts import wire
from contracts.wire import Options
from gateway.errors import DeadlinePassed, EngineBroke, GatewayError, Unavailable
from gateway.inference.answer import Answer, Call, Progress
from gateway.inference.batching import DynamicBatcher, images_that_fit
from gateway.inference.image_header import LARGE_PIXELS, count_pixels
from gateway.inference.questions import (
    check_question,
    share_of,
    wants_overlay,
    wire_options,
    wire_options_in_forward,
)
from gateway.inference.torchserve import raise_for_error, translate_entry
from gateway.refusals import ImageTooLarge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from contracts.wire import Entry
    from gateway.inference.admission import Admission, ConcurrencyLimiter, PixelBudget
    from gateway.inference.questions import Kind, Question
    from gateway.inference.routing import Router, Target
    from gateway.inference.torchserve import TorchServe

Received = TypeVar("Received")
# Upstream batches of /predict/batch in flight for each ready worker: the one that it works on, and the next.
BATCHES_PER_WORKER = 2
# While single images arrive, neither large images nor the upstream batches of /predict/batch get the last worker. These
# batches then have at most this number of images, so that a single image waits only briefly if there is one worker.
SHORT_BATCH_IMAGES = 8
# Single images count as arriving for this number of seconds after the last one.
SINGLES_LAST_S = 2


class Work(NamedTuple):
    """The work on each image of a call: its options, and the limiter whose places the call takes."""

    options: Options
    limiter: ConcurrencyLimiter


class InferenceService:
    """Predictions and explanations, each model and kind with its own places.

    An explanation that the version makes in the forward pass of a prediction goes to the same workers, in the same
    upstream batches. One that needs a backward pass goes alone to the explain entry; these have their own places.

    A call gives its place back only when TorchServe has answered or the deadline has passed, even if the caller has
    disconnected: until then TorchServe works on it.
    """

    def __init__(
        self,
        router: Router,
        upstream: TorchServe,
        *,
        admission: Admission,
        chunk_images: int,
        timeout_s: float,
        processes: int,
        max_pixels: int,
        pixels: PixelBudget,
    ) -> None:
        self._admission = admission
        self._router = router
        self._upstream = upstream
        self._chunk_images = chunk_images
        self._timeout_s = timeout_s
        self._batcher = DynamicBatcher(upstream, chunk_images, processes)
        self._max_pixels = max_pixels
        self._pixels = pixels

    async def predict(self, image: bytes, *, top_k: int, call: Call) -> Answer:
        """Return the prediction for one image: `class`, `confidence` and `top` in its only entry; or its error."""
        progress = Progress(call)
        try:
            pixels = count_pixels(image, self._max_pixels)
            with self._choose("predict", progress) as target:
                work = Work(Options(top_k=top_k), self._admission.of(target.model).predict)
                received = await self._answer_one(target, image, pixels, work, progress)
        except GatewayError as error:
            return progress.answer(error=error)
        return answer_of_one(received, progress)

    async def explain(self, image: bytes, question: Question, *, call: Call) -> Answer:
        """Return the overlay that the question asks for, or the explanation in the only entry; or the call's error."""
        progress = Progress(call)
        try:
            pixels = count_pixels(image, self._max_pixels)
            with self._choose("explain", progress, question.method) as target:
                work = self._explaining(target, question)
                received = await self._answer_one(target, image, pixels, work, progress)
        except GatewayError as error:
            return progress.answer(error=error)
        return answer_of_one(received, progress)

    async def predict_batch(
        self, images: Sequence[bytes], *, top_k: int, call: Call, question: Question | None = None
    ) -> Answer:
        """Return one entry per image, in order: a prediction, or `{"error": {…}}` as a caller gets it.

        With a `question` the entries are explanations by a method of the forward pass. The images are sent in several
        upstream batches that keep all ready workers of all replicas busy. If one of these fails, only its own images
        have an error; an image that is too large is the only one that has an error. The answer has an error if no
        upstream batch was answered, if the images together have too many pixels, or if the version has no method of the
        forward pass.
        """
        progress = Progress(call)
        try:
            with self._choose("predict", progress).held() as target:
                options = Options(top_k=top_k)
                if question is not None:
                    options = wire_options_in_forward(question, target.contract)
                work = Work(options, self._admission.of(target.model).predict)
                return progress.answer(await self._answer_all(target, images, work, progress))
        except GatewayError as error:
            return progress.answer(error=error)

    async def explain_batch(self, images: Sequence[bytes], question: Question, *, call: Call) -> Answer:
        """Return one entry per image, in order: an explanation, or `{"error": {…}}` as a caller gets it.

        The images are sent as by `predict_batch`; by a method that needs a backward pass, one after the other.
        """
        progress = Progress(call)
        try:
            with self._choose("explain", progress, question.method).held() as target:
                work = self._explaining(target, question)
                return progress.answer(await self._answer_all(target, images, work, progress))
        except GatewayError as error:
            return progress.answer(error=error)

    def _explaining(self, target: Target, question: Question) -> Work:
        check_question(question, target.contract)
        limits = self._admission.of(target.model)
        limiter = limits.explain if target.entry == "predict" else limits.backward
        return Work(wire_options(question, target.contract), limiter)

    async def _answer_one(
        self, target: Target, image: bytes, pixels: int, work: Work, progress: Progress
    ) -> Entry | bytes:
        """Return the image's entry, or its overlay.

        Raises:
            GatewayError: the image was refused, or the call failed.
        """
        caller = progress.call.caller
        with self._pixels.hold(pixels, caller):
            with progress.stage("wait"):
                await work.limiter.take(caller)
            try:
                with progress.stage("model"):
                    if pixels > LARGE_PIXELS:
                        most = partial(self._most_in_flight, target, 1)
                        turns = self._admission.of(target.model).large_turns[target.entry]
                        async with turns.turn(most, progress.call.deadline):
                            received = await self._send_one(target, image, work, progress.call)
                    else:
                        received = await self._send_small(target, image, pixels, work, progress)
            finally:
                work.limiter.give_back(1, caller)
        if isinstance(received, dict):
            raise_for_error(received)
        return received

    async def _send_small(
        self, target: Target, image: bytes, pixels: int, work: Work, progress: Progress
    ) -> Entry | bytes:
        """Send an image in an upstream batch with images of other callers, if it can be, else alone."""
        if target.entry == "explain":
            return await self._send_one(target, image, work, progress.call)
        self._admission.of(target.model).last_single = time.monotonic()
        if wants_overlay(work.options):
            return await self._send_one(target, image, work, progress.call)

        async def send(to: Target) -> Entry:
            progress.batch_id = ""  # at a second try that of the first
            return await self._batcher.answer(to, image, pixels=pixels, options=work.options, progress=progress)

        return await self._send(target, send)

    async def _answer_all(
        self, target: Target, images: Sequence[bytes], work: Work, progress: Progress
    ) -> Sequence[Entry]:
        entries: list[Entry] = [{}] * len(images)
        pixels: dict[int, int] = {}
        for index, image in enumerate(images):
            try:
                pixels[index] = count_pixels(image, self._max_pixels)
            except ImageTooLarge as error:
                entries[index] = error_entry(error)
        if pixels:
            with self._pixels.hold(sum(pixels.values()), progress.call.caller):
                sent = [images[index] for index in pixels]
                answers = await self._answer_in_batches(target, sent, list(pixels.values()), work, progress)
            for index, answer in zip(pixels, answers, strict=True):
                entries[index] = answer
        return entries

    async def _answer_in_batches(
        self, target: Target, images: Sequence[bytes], pixels: Sequence[int], work: Work, progress: Progress
    ) -> list[Entry]:
        call = progress.call
        batches = list(split_images(images, pixels, self._images_per_batch(len(images), target, work.options)))
        entries: list[Entry] = [{}] * len(images)
        failures: list[GatewayError] = []
        waiting = iter(batches)

        async def send_batches() -> None:
            for first, last in waiting:
                try:
                    answers = await self._send_batch(target, images[first:last], sum(pixels[first:last]), work, call)
                    entries[first:last] = [publish(answer) for answer in answers]
                except GatewayError as error:
                    failures.append(error)
                    entries[first:last] = [error_entry(error)] * (last - first)

        with progress.stage("wait"):
            await work.limiter.take(call.caller)
        # Several at once only if places are free now: a call does not wait for places after some of its work is done.
        per_worker = BATCHES_PER_WORKER if target.entry == "predict" else 1
        most = min(self._router.workers(target).ready * per_worker, len(batches))
        places = 1 + work.limiter.take_free(most - 1, call.caller)
        try:
            with progress.stage("model"):
                await asyncio.gather(*(send_batches() for _ in range(places)))
        finally:
            work.limiter.give_back(places, call.caller)
        if len(failures) == len(batches):
            raise failures[0]
        return entries

    def _choose(self, kind: Kind, progress: Progress, method: str | None = None) -> Target:
        call = progress.call
        left_s = call.deadline.left_s()
        if left_s <= 0:
            raise DeadlinePassed(call.deadline.timeout_s)
        progress.is_hurried = left_s < self._timeout_s / 2
        target = self._router.choose(kind, call.version, call.key_name, call.model, method=method)
        progress.model, progress.version, progress.contract = target.model, target.version, target.contract
        return target

    async def _send_one(self, target: Target, image: bytes, work: Work, call: Call) -> Entry | bytes:
        """Send an image alone, and return its entry or its overlay."""
        send = partial(
            self._upstream.ask, image=image, carried=call.carried, deadline=call.deadline, options=work.options
        )
        return await self._send(target, send)

    async def _send_batch(
        self, target: Target, images: Sequence[bytes], pixels: int, work: Work, call: Call
    ) -> list[Entry]:
        """Wait for a turn, then send images of one call together to the replica that has the least work then.

        To the explain entry one image is sent, without a turn.
        """
        if target.entry == "explain":
            with self._router.choose_again(target) as chosen:
                entry = await self._send_one(chosen, images[0], work, call)
            return [entry] if isinstance(entry, dict) else []
        send = partial(
            self._upstream.predict,
            images=images,
            carried=call.carried,
            deadline=call.deadline,
            top_k=work.options.top_k,
            each=work.options.images * len(images),
        )
        is_large = pixels > LARGE_PIXELS
        limits = self._admission.of(target.model)
        turns = limits.large_turns["predict"] if is_large else limits.batch_turns
        most = partial(self._most_in_flight, target, 1 if is_large else BATCHES_PER_WORKER)
        async with turns.turn(most, call.deadline):
            with self._router.choose_again(target) as chosen:
                return await self._send(chosen, send)

    async def _send(self, target: Target, send: Callable[[Target], Awaitable[Received]]) -> Received:
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
            another = self._router.choose_another(target)
            if another is None:
                raise
        with another:
            return await send(another)

    def _most_in_flight(self, target: Target, per_worker: int) -> int:
        """Return the number of batches, or large images, that may be in flight; single images keep one worker."""
        workers = self._router.workers(target)
        if target.entry == "explain" or self._singles_arrive(target):
            return workers._replace(ready=max(1, workers.ready - 1)).share()
        return workers.share() * per_worker

    def _singles_arrive(self, target: Target) -> bool:
        """Return True if a single image, which is not large, came for the model in the last `SINGLES_LAST_S`."""
        return time.monotonic() - self._admission.of(target.model).last_single < SINGLES_LAST_S

    def _images_per_batch(self, count: int, target: Target, options: Options) -> int:
        """Return the images per upstream batch that give each free worker one; busy workers get one long batch."""
        if target.entry == "explain":
            return 1
        limits = self._admission.of(target.model)
        free = max(1, self._router.workers(target).ready - limits.predict.taken - limits.explain.taken)
        most = min(self._chunk_images, SHORT_BATCH_IMAGES) if self._singles_arrive(target) else self._chunk_images
        if options.images:
            most = min(most, images_that_fit(share_of(options.images[0], target.contract), self._chunk_images))
        return min(most, math.ceil(count / free))


def answer_of_one(received: Entry | bytes, progress: Progress) -> Answer:
    """Return the answer to a call with one image: its overlay, or its entry."""
    return progress.answer(overlay=received) if isinstance(received, bytes) else progress.answer((received,))


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
