"""The gateway's answers as frozen dataclasses. `answer.class_name` and `answer["class"]` are the same value.

Each answer keeps the gateway's JSON in `document`, and `answer[name]` reads it, so that a field which a later gateway
adds can be read by its name.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gradserve.errors import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

T = TypeVar("T")
Document = dict[str, Any]

NOT_SENT = "the gateway did not send it: it is of an earlier release than this client"


@dataclass(frozen=True)
class Unavailable:
    """A part of the evidence that the version cannot give, and the reason.

    It is neither true nor false: `if evidence.familiar` raises `TypeError` instead of taking the unknown for a no.
    """

    reason: str

    def __bool__(self) -> NoReturn:
        raise TypeError(f"not available, neither true nor false: {self.reason}")


@dataclass(frozen=True)
class ClassConfidence:
    """One class and the model's confidence in it, from 0 to 1."""

    class_name: str
    confidence: float


@dataclass(frozen=True)
class Target:
    """The class that a heatmap is about. `confidence` is None if the version was packed without evidence."""

    class_name: str
    confidence: float | None


@dataclass(frozen=True)
class ModelVersion:
    """The name and the version of the model that answered."""

    name: str
    version: str


@dataclass(frozen=True)
class Heatmap:
    """A heatmap at the model's input size. `values` has `height * width` numbers from 0 to 1, row by row."""

    height: int
    width: int
    values: tuple[float, ...] = field(repr=False)

    def array(self) -> NDArray[np.float32]:
        """Return the heatmap as a float32 array of the shape (height, width).

        Raises:
            MissingPackage: numpy is not installed.
        """
        try:
            import numpy as np  # noqa: PLC0415 - optional
        except ImportError as error:
            raise MissingPackage("numpy", "Heatmap.array()") from error
        return np.array(self.values, dtype=np.float32).reshape(self.height, self.width)

    def image(self) -> Image:
        """Return the heatmap as a grey PIL image, white where the heat is 1.

        Raises:
            MissingPackage: Pillow is not installed.
        """
        try:
            from PIL import Image  # noqa: PLC0415 - optional
        except ImportError as error:
            raise MissingPackage("pillow", "Heatmap.image()") from error
        levels = bytes(round(255 * value) for value in self.values)
        return Image.frombytes("L", (self.width, self.height), levels)


@dataclass(frozen=True)
class Similar:
    """A training image near the image that was asked about; `Client.example` returns its thumbnail.

    `similarity` is the cosine of the two images' features. `url` is the thumbnail's path at the gateway, empty if the
    version has no thumbnails.
    """

    id: int
    class_name: str
    similarity: float
    url: str


@dataclass(frozen=True)
class AnswerSet:
    """The classes that together hold the right one with the coverage that was asked for, best first."""

    classes: tuple[ClassConfidence, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, best first."""
        return tuple(entry.class_name for entry in self.classes)


@dataclass(frozen=True)
class RegionTest:
    """The heatmap's claim, tried on the image.

    `kept` is the confidence in the target with only the hottest quarter kept and the rest blurred, `removed` the one
    with the hottest quarter blurred away; `verdict` is a sentence.
    """

    kept: float
    removed: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class _Answer:
    document: Mapping[str, Any] = field(repr=False, compare=False)
    """The gateway's JSON."""

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - a member of a JSON object
        """Return the field `name` of the gateway's JSON."""
        return self.document[name]

    def __contains__(self, name: object) -> bool:
        return name in self.document


@dataclass(frozen=True, kw_only=True)
class Prediction(_Answer):
    """The class of one image.

    `top` are the `top_k` best classes, best first. `familiar` is False if the image resembles no training image, and
    None if the version was packed without evidence.
    """

    class_name: str
    confidence: float
    top: tuple[ClassConfidence, ...]
    familiar: bool | None
    model: ModelVersion | None
    request_id: str


@dataclass(frozen=True, kw_only=True)
class Failed(_Answer):
    """The error of one image of a batch; `document["error"]` has its facts."""

    status: int
    code: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Evidence(_Answer):
    """The class of one image and the evidence for it.

    Attributes:
        class_name: the best class.
        confidence: the model's confidence in it.
        target: the class that heatmap, strength and test are about.
        method: the method of the heatmap.
        heatmap: None if it was not asked for.
        strength: the heatmap's maximum before it was scaled to 1 (that of `cam` by methods which need a backward pass);
            comparable between the classes of one image.
        familiar: False if the image resembles no training image.
        familiarity: the share of held-out images that are less familiar than this one.
        similar: the nearest training images of the best class and of the runner-up, by falling similarity.
        answer_set: the classes that hold the right one with the coverage asked for; None if none was asked for.
        test: the heatmap's claim, tried on the image; None if it was not asked for.
        model: the version that answered.
        request_id: names the call in logs and in `feedback`.
    """

    class_name: str
    confidence: float
    target: Target
    method: str
    heatmap: Heatmap | None
    strength: float | Unavailable
    familiar: bool | Unavailable
    familiarity: float | Unavailable
    similar: tuple[Similar, ...] | Unavailable
    answer_set: AnswerSet | Unavailable | None
    test: RegionTest | Unavailable | None
    model: ModelVersion | None
    request_id: str


def parse_prediction(document: Document) -> Prediction:
    """Return the prediction in an answer of /predict, or in an entry of /predict/batch.

    Raises:
        KeyError, TypeError, ValueError: it is no prediction.
    """
    familiar = document.get("familiar")
    return Prediction(
        document=document,
        class_name=str(document["class"]),
        confidence=float(document["confidence"]),
        top=tuple(_class_confidence(entry) for entry in document.get("top", ())),
        familiar=familiar if isinstance(familiar, bool) else None,
        model=_model(document),
        request_id=str(document.get("request_id", "")),
    )


def parse_evidence(document: Document) -> Evidence:
    """Return the evidence in an answer of /explain, or in an entry of /explain/batch.

    Raises:
        KeyError, TypeError, ValueError: it is no explanation.
    """
    return Evidence(
        document=document,
        class_name=str(document["class"]),
        confidence=float(document["confidence"]),
        target=_target(document["target"]),
        method=str(document["method"]),
        heatmap=_heatmap(document.get("heatmap")),
        strength=_part(document, "strength", float),
        familiar=_part(document, "familiar", bool),
        familiarity=_part(document, "familiarity", float),
        similar=_part(document, "similar", lambda found: tuple(map(_similar, found))),
        answer_set=_part(document, "classes", _answer_set) if "classes" in document else None,
        test=_part(document, "test", _region_test) if "test" in document else None,
        model=_model(document),
        request_id=str(document.get("request_id", "")),
    )


def parse_failed(document: Document) -> Failed:
    """Return the error in an entry of a batch.

    Raises:
        KeyError, TypeError, ValueError: it is no error.
    """
    error = document["error"]
    return Failed(
        document=document,
        status=int(error.get("status", 500)),
        code=str(error["code"]),
        detail=str(error.get("detail", "")),
    )


def parse_batch(document: Document, parse: Callable[[Document], T], count: int) -> list[T | Failed]:
    """Return the `count` entries of a batch's answer, each with the batch's model and request id.

    Raises:
        KeyError, TypeError, ValueError: it is no batch of `count` entries.
    """
    entries = document["results"]
    shared: Document = {name: document[name] for name in ("model", "request_id") if name in document}
    if len(entries) != count:
        raise ValueError(f"{len(entries)} entries for {count} images")
    return [parse_failed(entry) if "error" in entry else parse({**entry, **shared}) for entry in entries]


def _part(document: Document, name: str, parse: Callable[[Any], T]) -> T | Unavailable:
    value = document.get(name)
    if value is None:
        return Unavailable(NOT_SENT)
    if isinstance(value, dict) and "unavailable" in value:
        return Unavailable(str(value["unavailable"]))
    return parse(value)


def _class_confidence(entry: Document) -> ClassConfidence:
    return ClassConfidence(str(entry["class"]), float(entry["confidence"]))


def _model(document: Document) -> ModelVersion | None:
    model = document.get("model")
    return ModelVersion(str(model["name"]), str(model["version"])) if model else None


def _target(target: Any) -> Target:  # noqa: ANN401 - JSON
    if isinstance(target, str):  # a gateway of an earlier release
        return Target(target, None)
    confidence = target["confidence"]
    return Target(str(target["class"]), None if confidence is None else float(confidence))


def _heatmap(heat: Any) -> Heatmap | None:  # noqa: ANN401 - JSON
    if heat is None:
        return None
    if isinstance(heat, dict):
        height, width = int(heat["height"]), int(heat["width"])
        values = tuple(level / 255 for level in base64.b64decode(heat["values"], validate=True))
    else:
        height, width = len(heat), len(heat[0])
        values = tuple(float(value) for row in heat for value in row)
    if len(values) != height * width:
        raise ValueError(f"the heatmap has {len(values)} values for {height} x {width} pixels")
    return Heatmap(height, width, values)


def _similar(entry: Document) -> Similar:
    url = entry.get("image")
    return Similar(
        int(entry["id"]), str(entry["class"]), float(entry["similarity"]), url if isinstance(url, str) else ""
    )


def _answer_set(classes: list[Document]) -> AnswerSet:
    return AnswerSet(tuple(map(_class_confidence, classes)))


def _region_test(test: Document) -> RegionTest:
    return RegionTest(float(test["kept"]), float(test["removed"]), str(test["verdict"]))
