"""The shadow: a version that gets copies of answered calls and whose answers nobody gets.

What it says of the same images is compared with what the stable version said, and counted. A copy is sent after the
caller has the answer, has places of its own, and is the first thing to go under load.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.background import BackgroundTask

from contracts.wire import Options
from gateway.errors import GatewayError
from gateway.inference.service import cut_rows
from gateway.inference.torchserve import Deadline, raise_for_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import Response

    from contracts.wire import Entry
    from gateway.inference.admission import ConcurrencyLimiter
    from gateway.inference.routing import Router
    from gateway.inference.service import Answer
    from gateway.inference.torchserve import TorchServe
    from gateway.telemetry.metrics import Metrics

# Copies on their way at a time, in one process. Each holds one row's images, at most 6.5 MB: this bounds memory too.
MOST_MIRRORS = 4
# With more than a quarter of the predictions' places taken, callers need the cores more.
LOAD_DIVISOR = 4
# The class that the stable version named is looked up among so many of the shadow's; beyond, its confidence is as good
# as 0.
TOP_K = 100


class Shadow:
    """Mirrors calls that the stable version has answered to the plan's shadow, and counts how the answers compare."""

    def __init__(
        self,
        versions: Router,
        upstream: TorchServe,
        metrics: Metrics,
        *,
        predict: ConcurrencyLimiter,
        timeout_s: float,
        row_images: int,
    ) -> None:
        self._versions = versions
        self._upstream = upstream
        self._metrics = metrics
        self._predict = predict
        self._timeout_s = timeout_s
        self._row_images = row_images
        self._mirrors: set[asyncio.Task[None]] = set()

    def follow(self, response: Response, images: Sequence[bytes], answer: Answer, request_id: str) -> None:
        """Have the call mirrored when `response` is sent, where the plan names a shadow; of a batch, its first row."""
        plan = self._versions.plan
        if plan is None or plan.shadow is None or answer.version != plan.stable.version:
            return
        first_row = images[: self._row_images]
        _, last = next(cut_rows(first_row, [0] * len(first_row), self._row_images))
        pairs = [pair for pair in zip(images[:last], answer.entries[:last], strict=True) if "class" in pair[1]]
        if pairs:
            response.background = BackgroundTask(self._begin, plan.shadow.version, pairs, request_id)

    async def close(self) -> None:
        """Lets go of the copies on their way."""
        for mirror in self._mirrors:
            mirror.cancel()
        await asyncio.gather(*self._mirrors, return_exceptions=True)

    async def _begin(self, version: str, pairs: list[tuple[bytes, Entry]], request_id: str) -> None:
        """Sends the copy if there is room. It does not wait for it: the caller's connection is needed again."""
        if len(self._mirrors) >= MOST_MIRRORS or self._predict.taken > self._predict.limit // LOAD_DIVISOR:
            self._metrics.count_mirrored(version, "dropped", len(pairs))
            return
        mirror = asyncio.create_task(self._mirror(version, pairs, request_id))
        self._mirrors.add(mirror)
        mirror.add_done_callback(self._mirrors.discard)

    async def _mirror(self, version: str, pairs: list[tuple[bytes, Entry]], request_id: str) -> None:
        images = [image for image, _ in pairs]
        try:
            with self._versions.choose("predict", version) as target:
                answers = await self._upstream.predict(
                    target, images, carried=Options(request_id), deadline=Deadline(self._timeout_s), top_k=TOP_K
                )
        except GatewayError:
            self._metrics.count_mirrored(version, "failed", len(pairs))
            return
        for (_, stable), answer in zip(pairs, answers, strict=True):
            self._compare(version, stable, answer)

    def _compare(self, version: str, stable: Entry, answer: Entry) -> None:
        try:
            raise_for_error(answer)
            confidences = {entry["class"]: float(entry["confidence"]) for entry in answer["top"]}
        except (GatewayError, KeyError, TypeError, ValueError):  # whatever a version on trial may say
            self._metrics.count_mirrored(version, "failed")
            return
        self._metrics.count_mirrored(version, "agree" if answer["class"] == stable["class"] else "disagree")
        self._metrics.observe_shift(version, confidences.get(stable["class"], 0.0) - stable["confidence"])
