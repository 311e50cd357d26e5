"""The public answers as types: FastAPI documents them, and a test checks real answers against them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.api.params import LEAST_COVERAGE, MAX_NAME_CHARACTERS, MAX_TOP_K, MOST_COVERAGE


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, use_attribute_docstrings=True)


class ClassConfidence(_Answer):
    """One class and the model's confidence in it."""

    name: str = Field(alias="class")
    confidence: float = Field(ge=0, le=1)


class ModelName(_Answer):
    """The name and the version of the model that answered."""

    name: str
    version: str


class ImagePrediction(ClassConfidence):
    """The best class of one image, and the `top_k` best, best first."""

    top: list[ClassConfidence]
    familiar: bool | None = None
    """The image is like the training images; missing if the version's archive cannot tell."""


class Prediction(ImagePrediction):
    """The answer of /predict."""

    model: ModelName
    request_id: str


class ImageError(BaseModel):
    """The error of one image of a batch; further members are the error's facts."""

    model_config = ConfigDict(extra="allow")

    status: int
    code: str
    detail: str


class FailedImage(_Answer):
    """The entry of an image that has no prediction."""

    error: ImageError


class BatchPrediction(_Answer):
    """The answer of /predict/batch: one entry per image, in order."""

    results: list[ImagePrediction | FailedImage]
    model: ModelName
    request_id: str


class Unavailable(_Answer):
    """Evidence that cannot be given, and the reason."""

    unavailable: str


class TargetClass(_Answer):
    """The class that the heatmap is about, and the model's confidence in it (null: the version does not tell it)."""

    name: str = Field(alias="class")
    confidence: float | None = Field(ge=0, le=1)


class CompactHeatmap(_Answer):
    """A heatmap of `height` x `width` bytes, row by row, 255 for the hottest pixel."""

    height: int
    width: int
    values: str = Field(json_schema_extra={"contentEncoding": "base64"})


class SimilarImage(_Answer):
    """A training image: its class, the cosine similarity to the image, and the path of its thumbnail."""

    id: int
    name: str = Field(alias="class")
    similarity: float
    image: str | None = None
    """Missing if the version was packed without thumbnails."""


class HeatmapTest(_Answer):
    """The target's confidence with only the hottest quarter of the image kept (the rest blurred), and with it blurred.

    `verdict` says in words what this means for the heatmap.
    """

    kept: float
    removed: float
    verdict: str


class ImageExplanation(ClassConfidence):
    """The class of one image and the evidence for it."""

    target: TargetClass
    method: str
    """Name of the heatmap's method."""
    heatmap: list[list[float]] | CompactHeatmap | None = None
    """Rows of numbers from 0 to 1 at the model's input size, or the form that the call asks for."""
    strength: float | Unavailable
    """Maximum of the heatmap before it was scaled to 1 (that of `cam`, for methods which need a backward pass),
    comparable between the classes of one image; 0 if nothing in the image supports the class."""
    familiar: bool | Unavailable
    """The image is like the training images."""
    familiarity: float | Unavailable
    """Share of held-out images that are less familiar than this image."""
    similar: list[SimilarImage] | Unavailable
    """Nearest training images of the class and of the second best class, by falling similarity."""
    classes: list[ClassConfidence] | Unavailable | None = None
    """With `coverage`: the smallest set that holds the right class in this share of images, best first."""
    test: HeatmapTest | Unavailable | None = None
    """With `test=true`: what the heatmap claims, tried on this image."""


class Explanation(ImageExplanation):
    """The answer of /explain as JSON."""

    model: ModelName
    request_id: str


class BatchExplanation(_Answer):
    """The answer of /explain/batch: one entry per image, in order."""

    results: list[ImageExplanation | FailedImage]
    model: ModelName
    request_id: str


class FeedbackCall(_Answer):
    """The right class of the image of an earlier /predict or /explain."""

    request_id: str = Field(min_length=1, max_length=128)
    """The id that the earlier answer had."""
    class_name: str = Field(alias="class", min_length=1, max_length=MAX_NAME_CHARACTERS)
    """The right class, one of the version's."""
    note: str = Field(default="", max_length=1000)
    """A remark for whoever reads the feedback."""


class FeedbackKept(_Answer):
    """The answer of /feedback."""

    request_id: str
    class_name: str = Field(alias="class")


class Problem(BaseModel):
    """Every error (RFC 9457); `code` is stable, further members are the error's facts."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str


class Workers(_Answer):
    """Workers of one kind over all replicas; `pending` upstream batches wait for them (null: not known).

    `fallback` of the ready workers run the model's fallback engine: slower, with the same answers within its tolerance.
    """

    ready: int
    wanted: int
    fallback: int
    pending: int | None


class WorkerKinds(_Answer):
    """The workers for predictions and those for explanations."""

    predict: Workers
    explain: Workers


class VersionHealth(_Answer):
    """One version: its role in its model's plan, its state, and whether calls can be sent to it.

    `share` is the share, in per cent, that the plan gives it of the calls that name no version.
    """

    model: str
    version: str
    role: str
    share: float
    state: Literal["ready", "degraded", "verifying", "loading", "failed"]
    routable: bool
    workers: WorkerKinds


class ReplicaCount(_Answer):
    """Replicas that are configured, and those whose agent gives a fresh status."""

    known: int
    seen: int


class Health(_Answer):
    """The answer of /health."""

    status: Literal["ok", "degraded", "unavailable"]
    model: str | None
    plan_revision: int | None
    replicas: ReplicaCount
    versions: list[VersionHealth]
    reasons: list[str]


class VersionInfo(VersionHealth):
    """One version with its contract: classes, input, explanation methods, accepted figures."""

    contract: dict[str, Any]


class Models(_Answer):
    """The answer of /models: the default model's name, and the versions of all models."""

    name: str | None
    versions: list[VersionInfo]


class State(_Answer):
    """The answer of the probes."""

    status: str


class InferTensor(_Answer):
    """The input of a V2 call: the images, in JSON as base64."""

    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=1)
    data: list[Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]] = Field(min_length=1)


class InferOutput(BaseModel):
    """An output that a V2 call asks for."""

    name: Literal["class", "confidence", "familiar", "familiarity", "classes"]


class InferOptions(BaseModel):
    """The parameters of a V2 call."""

    top_k: int = Field(default=1, ge=1, le=MAX_TOP_K)
    coverage: float = Field(default=0.95, ge=LEAST_COVERAGE, le=MOST_COVERAGE)


class InferCall(BaseModel):
    """A V2 call in JSON."""

    id: str = ""
    inputs: list[InferTensor] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] = []
    parameters: InferOptions = InferOptions()
