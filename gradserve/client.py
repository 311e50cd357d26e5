"""Call a gateway from Python. This package needs only httpx.

with Client("http://localhost:8000") as client:
answer = client.predict("cat.png", top_k=3)
print(answer.class_name, answer.confidence)
Path("cat-heatmap.png").write_bytes(client.explain("cat.png"))
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, TypeVar

import httpx

from gradserve import calls
from gradserve.calls import Call, RetryPolicy, read_image, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Any

    from gradserve.answers import Evidence, Failed, Prediction, Similar
    from gradserve.calls import ImageSource

T = TypeVar("T")


class Client:
    """A client for one gateway. An image is the bytes or the path of a file.

    A call that the gateway refused before it began (503 with Retry-After, 429) is sent again after that time, at most
    `retries` times. If Retry-After is above `timeout_s`, as for a daily quota, the refusal is raised at once.

    Every method raises `GatewayProblem` if the gateway refused or failed, and `httpx.TransportError` without an answer.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=key_header(key), timeout=timeout_s, transport=transport)
        self._policy = RetryPolicy(retries, timeout_s)
        self._sleep = sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self, image: ImageSource, *, top_k: int = 1, version: str | None = None, model: str | None = None
    ) -> Prediction:
        """Return the image's class with the model's confidence.

        Args:
            image: the bytes or the path of an image file.
            top_k: the number of classes in `top`, best first.
            version: the version to ask; by default the gateway chooses.
            model: the model to ask; by default the gateway's default model.
        """
        return self._send(calls.predict(read_image(image), top_k=top_k, version=version, model=model))

    def predict_batch(
        self, images: Iterable[ImageSource], *, top_k: int = 1, version: str | None = None, model: str | None = None
    ) -> list[Prediction | Failed]:
        """Return one entry per image, in order; the entry of an image that failed is its error.

        Many images are sent in several calls.
        """
        return [
            entry
            for group in split(images)
            for entry in self._send(calls.predict_batch(group, top_k=top_k, version=version, model=model))
        ]

    def explain(
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
        """Return the heatmap over the image, as the bytes of a PNG file.

        Args:
            image: the bytes or the path of an image file.
            target: the class to explain; by default the predicted one.
            method: the heatmap's method; `models()` lists them.
            alpha: the opacity of the heatmap, from 0 to 1.
            size: pixels of the longer side.
            version: the version to ask; by default the gateway chooses.
            model: the model to ask; by default the gateway's default model.
        """
        call = calls.explain(
            read_image(image), target=target, method=method, alpha=alpha, size=size, version=version, model=model
        )
        return self._send(call)

    def evidence(
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
        """Return the image's class and the evidence for it.

        Args:
            image: the bytes or the path of an image file.
            target: the class to explain; by default the predicted one.
            method: the heatmap's method; `models()` lists them.
            coverage: ask for the classes that hold the right one with this probability, 0.5 to 0.999.
            test: try the heatmap's claim on the image.
            similar: the number of similar training images of each of two classes, 0 to 10.
            heatmap: False leaves the heatmap out, which makes the answer small.
            version: the version to ask; by default the gateway chooses.
            model: the model to ask; by default the gateway's default model.
        """
        call = calls.evidence(
            read_image(image),
            target=target,
            method=method,
            coverage=coverage,
            test=test,
            similar=similar,
            heatmap=heatmap,
            version=version,
            model=model,
        )
        return self._send(call)

    def explain_batch(
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
        """Return the evidence about each image, in order; the entry of an image that failed is its error.

        Many images are sent in several calls. The options are those of `evidence`.
        """
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
        return [entry for group in split(images) for entry in self._send(calls.explain_batch(group, **options))]

    def heatmap(
        self,
        image: ImageSource,
        *,
        target: str | None = None,
        method: str | None = None,
        version: str | None = None,
        model: str | None = None,
    ) -> Evidence:
        """Return the same as `evidence`, which replaces this method."""
        warnings.warn("Client.heatmap is Client.evidence now", DeprecationWarning, stacklevel=2)
        return self.evidence(image, target=target, method=method, version=version, model=model)

    def example(self, similar: Similar) -> bytes:
        """Return the thumbnail of a training image in an evidence's `similar`, as the bytes of a PNG file.

        Raises:
            ValueError: the version has no thumbnails.
        """
        return self._send(calls.example(similar))

    def feedback(self, request_id: str, class_name: str, *, note: str | None = None) -> None:
        """Report the right class of the image of an earlier call; a repeat replaces the earlier report."""
        self._send(calls.feedback(request_id, class_name, note))

    def health(self) -> dict[str, Any]:
        """Return the health report; `status` is `ok`, `degraded` or `unavailable`."""
        return self._send(calls.health())

    def models(self) -> dict[str, Any]:
        """Return the versions with their roles, workers and contracts."""
        return self._send(calls.models())

    def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            answer = self._http.request(**call.arguments())
            pause_s = None if call.takes_errors else self._policy.pause_s(answer, attempt)
            if pause_s is None:
                return call.result(answer)
            self._sleep(pause_s)
            attempt += 1


def key_header(key: str | None) -> dict[str, str]:
    """Return the header that carries the API key; none without a key."""
    return {"authorization": f"Bearer {key}"} if key else {}
