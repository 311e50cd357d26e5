"""The two sources of answers: a gateway, and an archive that is loaded into this process.

Both return the client's dataclasses, so that the commands do not know which of them answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import httpx

from control.errors import ControlError, NoGateway
from gradserve import Client, Evidence, Failed, GatewayProblem, Prediction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

# The caller must do something before any image can be answered, so that the next one is not asked about.
_STOP = {401, 403, 404, 429, 503}
_PARAMETERS = {"bad_parameter", "unknown_parameter", "unknown_target", "unknown_method"}


@dataclass(frozen=True)
class Question:
    """Options of an explanation; None means the version's default."""

    target: str | None = None
    method: str | None = None
    coverage: float | None = None
    test: bool = False
    alpha: float | None = None
    size: int | None = None


@dataclass(frozen=True)
class Explained:
    """The evidence about one image and the heatmap over it, a PNG file's bytes."""

    evidence: Evidence
    overlay: bytes


class Source(Protocol):
    """Answers questions about images."""

    def predict(self, images: Sequence[bytes], top_k: int) -> list[Prediction | Failed]:
        """Return one entry per image, in order.

        Raises:
            ControlError: no image can be answered; the text has the remedy.
        """

    def explain(self, image: bytes, question: Question) -> Explained | Failed:
        """Return the evidence about the image.

        Raises:
            ControlError: no image can be answered; the text has the remedy.
        """

    def close(self) -> None:
        """Release what the source holds."""


class GatewaySource:
    """Asks the gateway at `url`; `key` is its API key, `version` and `model` are what to ask, else it chooses."""

    def __init__(
        self,
        url: str,
        key: str | None,
        version: str | None = None,
        model: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url
        self._version = version
        self._model = model
        self._client = Client(url, key=key, retries=10, transport=transport)

    def predict(self, images: Sequence[bytes], top_k: int) -> list[Prediction | Failed]:
        """Return one entry per image, in order.

        Raises:
            ControlError: the gateway does not answer, or answers no image.
        """
        if not images:
            return []
        found = self._ask(
            lambda: self._client.predict_batch(images, top_k=top_k, version=self._version, model=self._model)
        )
        if not isinstance(found, Failed):
            return found
        if len(images) == 1:
            return [found]
        # One image makes the gateway refuse the whole call: find it.
        return [entry for image in images for entry in self.predict([image], top_k)]

    def explain(self, image: bytes, question: Question) -> Explained | Failed:
        """Return the evidence about the image.

        Raises:
            ControlError: the gateway does not answer, or answers no image.
        """
        return self._ask(lambda: self._explain(image, question))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _explain(self, image: bytes, question: Question) -> Explained:
        evidence = self._client.evidence(
            image,
            target=question.target,
            method=question.method,
            coverage=question.coverage,
            test=question.test,
            heatmap=False,
            version=self._version,
            model=self._model,
        )
        overlay = self._client.explain(
            image,
            target=evidence.target.class_name,
            method=question.method,
            alpha=question.alpha,
            size=question.size,
            # A canary may answer the first call.
            version=evidence.model.version if evidence.model else self._version,
            model=self._model,
        )
        return Explained(evidence, overlay)

    def _ask(self, call: Callable[[], T]) -> T | Failed:
        try:
            return call()
        except GatewayProblem as problem:
            if problem.status in {401, 403}:
                remedy = "set GRADSERVE_KEY, or name a file with the key by --key-file"
                raise ControlError(f"the gateway {self._url} answered {problem}; {remedy}") from problem
            if problem.status in _STOP or problem.code in _PARAMETERS:
                raise ControlError(f"the gateway {self._url} answered {problem}") from problem
            detail = str(problem.problem.get("detail", problem))
            return Failed(status=problem.status, code=problem.code, detail=detail, document={"error": problem.problem})
        except httpx.TimeoutException as error:
            return Failed(
                status=504, code="no_answer", detail=f"no answer in time ({type(error).__name__})", document={}
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoGateway(self._url, type(error).__name__) from error
