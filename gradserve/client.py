"""Call a gateway from Python. This module needs only httpx.

with Client("http://localhost:8000") as client:
    answer = client.predict(Path("cat.png"), top_k=3)
    Path("cat-heatmap.png").write_bytes(client.explain(Path("cat.png")))
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

# Statuses of calls that the gateway did not begin, so that they may be sent again.
RETRIED = {429, 503}


class GatewayProblem(Exception):
    """An error answer of the gateway; `problem` is the whole problem document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", "unknown"))
        self.problem = problem
        super().__init__(f"{status} {self.code}: {problem.get('detail', 'no detail')}")


class Client:
    """A client for one gateway. A refused call (429, 503) is sent again after Retry-After, at most `retries` times.

    If Retry-After is above `timeout_s`, as for a daily quota, the refusal is raised at once.
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
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)
        self._retries = retries
        self._longest_pause_s = timeout_s
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

    def predict(self, image: Path | bytes, *, top_k: int = 1, version: str | None = None) -> dict[str, Any]:
        """Return the image's class: `class`, `confidence`, `top`, `model`, `request_id`.

        Raises:
            GatewayProblem: the gateway refused or failed.
            httpx.TransportError: there was no answer.
        """
        params = _given(top_k=top_k, version=version)
        return self._json(self._post("/predict", params, content=_bytes(image), headers=_RAW))

    def predict_batch(
        self, images: Sequence[Path | bytes], *, top_k: int = 1, version: str | None = None
    ) -> list[dict[str, Any]]:
        """Return one entry per image, in order: a prediction or `{"error": {…}}`.

        Raises:
            GatewayProblem: the gateway refused or failed.
            httpx.TransportError: there was no answer.
        """
        files = [("file", ("image", _bytes(image), "application/octet-stream")) for image in images]
        params = _given(top_k=top_k, version=version)
        results: list[dict[str, Any]] = self._json(self._post("/predict/batch", params, files=files))["results"]
        return results

    def explain(
        self,
        image: Path | bytes,
        *,
        target: str | None = None,
        method: str | None = None,
        alpha: float | None = None,
        size: int | None = None,
        version: str | None = None,
    ) -> bytes:
        """Return the heatmap over the image, as the bytes of a PNG file.

        Raises:
            GatewayProblem: the gateway refused or failed.
            httpx.TransportError: there was no answer.
        """
        params = _given(target=target, method=method, alpha=alpha, size=size, version=version)
        return self._post("/explain", params, content=_bytes(image), headers=_RAW).content

    def heatmap(
        self, image: Path | bytes, *, target: str | None = None, method: str | None = None, version: str | None = None
    ) -> dict[str, Any]:
        """Return the explanation as numbers: `heatmap` (rows of 0..1 at the model's input size), `class` and more.

        Raises:
            GatewayProblem: the gateway refused or failed.
            httpx.TransportError: there was no answer.
        """
        params = _given(target=target, method=method, version=version)
        headers = {**_RAW, "accept": "application/json"}
        return self._json(self._post("/explain", params, content=_bytes(image), headers=headers))

    def health(self) -> dict[str, Any]:
        """Return the health report; `status` is `ok`, `degraded` or `unavailable`.

        Raises:
            httpx.TransportError: there was no answer.
        """
        return self._json(self._http.get("/health"))

    def models(self) -> dict[str, Any]:
        """Return the versions with their roles, workers and contracts.

        Raises:
            GatewayProblem: the gateway refused or failed.
            httpx.TransportError: there was no answer.
        """
        return self._json(_checked(self._http.get("/models")))

    def _post(self, path: str, params: dict[str, Any], **body: Any) -> httpx.Response:  # noqa: ANN401 — httpx's own
        for attempt in range(self._retries + 1):
            answer = self._http.post(path, params=params, **body)
            least_s = _least_pause_s(answer, attempt)
            if answer.status_code not in RETRIED or attempt == self._retries or least_s > self._longest_pause_s:
                break
            # Random, so that callers that were refused together do not all come back together.
            self._sleep(least_s * random.uniform(1.0, 1.5))  # noqa: S311 — no secret
        return _checked(answer)

    @staticmethod
    def _json(answer: httpx.Response) -> dict[str, Any]:
        data: dict[str, Any] = answer.json()
        return data


_RAW = {"content-type": "application/octet-stream"}


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:  # a proxy's page
        problem = {}
    raise GatewayProblem(answer.status_code, problem if isinstance(problem, dict) else {})


def _least_pause_s(answer: httpx.Response, attempt: int) -> float:
    asked = answer.headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else 0.5 * 2.0**attempt


def _bytes(image: Path | bytes) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image


def _given(**params: Any) -> dict[str, Any]:  # noqa: ANN401 — numbers and texts
    return {name: value for name, value in params.items() if value is not None}
