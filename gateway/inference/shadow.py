"""The shadow: a version that gets copies of calls that the stable version has answered. No caller gets its answers.

The gateway compares the two versions' answers to the same images and counts how they differ. A copy is sent after the
caller has got the answer, takes no place from callers, and is dropped first under load.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.background import BackgroundTask

from contracts.wire import Options
from gateway.errors import GatewayError
from gateway.inference.service import split_images
from gateway.inference.torchserve import Deadline, raise_for_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import Response

    from contracts.wire import Entry
    from gateway.inference.admission import Admission
    from gateway.inference.answer import Answer
    from gateway.inference.routing import Router
    from gateway.inference.torchserve import TorchServe
    from gateway.telemetry.metrics import Metrics

# Copies in flight at a time in one process. Each holds the images of one upstream batch, at most 6.5 MB.
MOST_MIRRORS = 4
# No copy is sent while more than a quarter of the model's places for predictions are taken: callers need the cores.
LOAD_DIVISOR = 4
# Classes of the shadow among which the stable version's class is searched; if missing, its confidence counts as 0.
TOP_K = 100


class Shadow:
    """Sends copies of calls to the plan's shadow, and counts how its answers compare with the stable version's."""

    def __init__(
        self,
        router: Router,
        upstream: TorchServe,
        metrics: Metrics,
        *,
        admission: Admission,
        timeout_s: float,
        batch_images: int,
    ) -> None:
        self._router = router
        self._upstream = upstream
        self._metrics = metrics
        self._admission = admission
        self._timeout_s = timeout_s
        self._batch_images = batch_images
        self._mirrors: set[asyncio.Task[None]] = set()

    def follow(self, response: Response, images: Sequence[bytes], answer: Answer, request_id: str) -> None:
        """Mirror the call after `response` is sent, if the plan has a shadow; of many images, the first batch."""
        plans = self._router.plans
        plan = plans.plan(answer.model) if plans is not None else None
        if plan is None or plan.shadow is None or answer.version != plan.stable.version:
            return
        first = images[: self._batch_images]
        _, last = next(split_images(first, [0] * len(first), self._batch_images))
        pairs = [pair for pair in zip(images[:last], answer.entries[:last], strict=True) if "class" in pair[1]]
        if pairs:
            shadow = (plan.model, plan.shadow.version)
            response.background = BackgroundTask(self._begin, *shadow, pairs, request_id)

    async def close(self) -> None:
        """Cancel the copies in flight."""
        for mirror in self._mirrors:
            mirror.cancel()
        await asyncio.gather(*self._mirrors, return_exceptions=True)

    async def _begin(self, model: str, version: str, pairs: list[tuple[bytes, Entry]], request_id: str) -> None:
        """Start sending the copy if there is room. It does not wait: the connection must take its next request."""
        places = self._admission.of(model).predict
        if len(self._mirrors) >= MOST_MIRRORS or places.taken > places.limit // LOAD_DIVISOR:
            self._metrics.count_mirrored(model, version, "dropped", len(pairs))
            return
        mirror = asyncio.create_task(self._mirror(model, version, pairs, request_id))
        self._mirrors.add(mirror)
        mirror.add_done_callback(self._mirrors.discard)

    async def _mirror(self, model: str, version: str, pairs: list[tuple[bytes, Entry]], request_id: str) -> None:
        images = [image for image, _ in pairs]
        try:
            with self._router.choose("predict", version, model=model) as target:
                answers = await self._upstream.predict(
                    target, images, carried=Options(request_id), deadline=Deadline(self._timeout_s), top_k=TOP_K
                )
        except GatewayError:
            self._metrics.count_mirrored(model, version, "failed", len(pairs))
            return
        for (_, stable), answer in zip(pairs, answers, strict=True):
            self._compare(model, version, stable, answer)

    def _compare(self, model: str, version: str, stable: Entry, answer: Entry) -> None:
        try:
            raise_for_error(answer)
            confidences = {entry["class"]: float(entry["confidence"]) for entry in answer["top"]}
        except (GatewayError, KeyError, TypeError, ValueError):  # the shadow's answer may have any form
            self._metrics.count_mirrored(model, version, "failed")
            return
        self._metrics.count_mirrored(model, version, "agree" if answer["class"] == stable["class"] else "disagree")
        self._metrics.observe_shift(model, version, confidences.get(stable["class"], 0.0) - stable["confidence"])
