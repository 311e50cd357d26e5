"""Call a gateway from asyncio; the methods are those of `gradserve.Client`.

async with AsyncClient("http://localhost:8000") as client:
answer = await client.predict("cat.png")
evidence = await client.evidence("cat.png", test=True)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import httpx

from gradserve import calls
from gradserve.calls import Call, RetryPolicy, read_image, split
from gradserve.client import key_header

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Any

    from gradserve.answers import Evidence, Failed, Prediction, Similar
    from gradserve.calls import ImageSource

T = TypeVar("T")


class AsyncClient:
    """A client for one gateway, for asyncio. Arguments, answers, errors and retries are those of `gradserve.Client`."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=key_header(key), timeout=timeout_s, transport=transport)
        self._policy = RetryPolicy(retries, timeout_s)
        self._sleep = sleep

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(
        self, image: ImageSource, *, top_k: int = 1, version: str | None = None, model: str | None = None
    ) -> Prediction:
        """Return the image's class with the model's confidence."""
        data = await asyncio.to_thread(read_image, image)
        return await self._send(calls.predict(data, top_k=top_k, version=version, model=model))

    async def predict_batch(
        self, images: Iterable[ImageSource], *, top_k: int = 1, version: str | None = None, model: str | None = None
    ) -> list[Prediction | Failed]:
        """Return one entry per image, in order; the entry of an image that failed is its error."""
        return await self._send_groups(
            images, lambda group: calls.predict_batch(group, top_k=top_k, version=version, model=model)
        )

    async def explain(
        self,
        image: ImageSource,
        *,
        target: str | None = None,
        method: str | None = None,
        alpha: float | None = None,
        size: int | None = None,
        version: str | None = None,
        model: str | None = None,
    ) -> bytes:
        """Return the heatmap over the image, as the bytes of a PNG file."""
        data = await asyncio.to_thread(read_image, image)
        call = calls.explain(data, target=target, method=method, alpha=alpha, size=size, version=version, model=model)
        return await self._send(call)

    async def evidence(
        self,
        image: ImageSource,
        *,
        target: str | None = None,
        method: str | None = None,
        coverage: float | None = None,
        test: bool = False,
        similar: int | None = None,
        heatmap: bool = True,
        version: str | None = None,
        model: str | None = None,
    ) -> Evidence:
        """Return the image's class and the evidence for it."""
        call = calls.evidence(
            await asyncio.to_thread(read_image, image),
            target=target,
            method=method,
            coverage=coverage,
            test=test,
            similar=similar,
            heatmap=heatmap,
            version=version,
            model=model,
        )
        return await self._send(call)

    async def explain_batch(
        self,
        images: Iterable[ImageSource],
        *,
        target: str | None = None,
        method: str | None = None,
        coverage: float | None = None,
        test: bool = False,
        similar: int | None = None,
        heatmap: bool = True,
        version: str | None = None,
        model: str | None = None,
    ) -> list[Evidence | Failed]:
        """Return the evidence about each image, in order; the entry of an image that failed is its error."""
        options: dict[str, Any] = {
            "target": target,
            "method": method,
            "coverage": coverage,
            "test": test,
            "similar": similar,
            "heatmap": heatmap,
            "version": version,
            "model": model,
        }
        return await self._send_groups(images, lambda group: calls.explain_batch(group, **options))

    async def example(self, similar: Similar) -> bytes:
        """Return the thumbnail of a training image in an evidence's `similar`, as the bytes of a PNG file."""
        return await self._send(calls.example(similar))

    async def feedback(self, request_id: str, class_name: str, *, note: str | None = None) -> None:
        """Report the right class of the image of an earlier call; a repeat replaces the earlier report."""
        await self._send(calls.feedback(request_id, class_name, note))

    async def health(self) -> dict[str, Any]:
        """Return the health report; `status` is `ok`, `degraded` or `unavailable`."""
        return await self._send(calls.health())

    async def models(self) -> dict[str, Any]:
        """Return the versions with their roles, workers and contracts."""
        return await self._send(calls.models())

    async def _send_groups(
        self, images: Iterable[ImageSource], call: Callable[[Sequence[bytes]], Call[list[T]]]
    ) -> list[T]:
        groups = split(images)
        entries: list[T] = []
        while group := await asyncio.to_thread(next, groups, None):
            answered: list[T] = await self._send(call(group))
            entries += answered
        return entries

    async def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            answer = await self._http.request(**call.arguments())
            pause_s = None if call.takes_errors else self._policy.pause_s(answer, attempt)
            if pause_s is None:
                return call.result(answer)
            await self._sleep(pause_s)
            attempt += 1
