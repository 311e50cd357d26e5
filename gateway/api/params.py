"""The types of the query parameters and headers that a caller may send with the image.

A parameter that a route does not declare, that comes twice or that has an impossible value is refused with a sentence
that names it, before the body is read.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Header
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.requests import Request

from contracts.names import NAME, VERSION
from contracts.wire import DEFAULTS, MAX_OVERLAY_SIDE
from gateway.inference.questions import Overlay, Question
from gateway.refusals import BadParameter, UnknownParameter

MAX_TOP_K = 1000
MAX_NAME_CHARACTERS = 200
MAX_TIMEOUT_MS = 10**9
LEAST_COVERAGE, MOST_COVERAGE = 0.5, 0.999
DEFAULT_SIMILAR, MAX_SIMILAR = 3, 10
MAX_EXAMPLE = 10**7


def whole_number(name: str, least: int, most: int, value: str) -> int:
    """Return the number that `value` writes in plain digits.

    Raises:
        BadParameter: `value` is no whole number from `least` to `most`.
    """
    # int() alone would take "1_0", " 7" and other scripts' digits.
    if value.isascii() and value.isdigit() and len(value) <= 12 and least <= int(value) <= most:
        return int(value)
    raise BadParameter(name, value, f"a whole number from {least} to {most}")


def check_number(name: str, least: float, most: float, value: str) -> float:
    """Return the number from `least` to `most` that `value` writes.

    Raises:
        BadParameter: `value` is no such number.
    """
    try:
        number = float(value) if value.isascii() and "_" not in value else math.nan
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise BadParameter(name, value, f"a number from {least:g} to {most:g}")
    return number


def check_choice(name: str, choices: tuple[str, ...], value: str) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        BadParameter: it is none of them.
    """
    if value not in choices:
        raise BadParameter(name, value, " or ".join(choices))
    return value


def check_name(name: str, value: str) -> str:
    """Return `value` if it can be the name of a class or a method.

    Raises:
        BadParameter: `value` is empty or too long.
    """
    if not 0 < len(value) <= MAX_NAME_CHARACTERS:
        raise BadParameter(name, value, f"a name of 1 to {MAX_NAME_CHARACTERS} characters")
    return value


def check_version(version: str) -> str:
    """Return `version` if it can be the name of a version.

    Raises:
        BadParameter: `version` does not match `contracts.names.VERSION`.
    """
    if not VERSION.fullmatch(version):
        raise BadParameter("version", version, "a version, like 1.0.0")
    return version


def check_model(model: str) -> str:
    """Return `model` if it can be the name of a model.

    Raises:
        BadParameter: `model` does not match `contracts.names.NAME`.
    """
    if not NAME.fullmatch(model):
        raise BadParameter("model", model, "a model's name, like cifar10")
    return model


# The validators come last, so that the OpenAPI document shows the bounds before them.
TopK = Annotated[int, Field(ge=1, le=MAX_TOP_K), BeforeValidator(partial(whole_number, "top_k", 1, MAX_TOP_K))]
Size = Annotated[
    int, Field(ge=1, le=MAX_OVERLAY_SIDE), BeforeValidator(partial(whole_number, "size", 1, MAX_OVERLAY_SIDE))
]
Alpha = Annotated[float, Field(ge=0, le=1), BeforeValidator(partial(check_number, "alpha", 0, 1))]
Coverage = Annotated[
    float,
    Field(ge=LEAST_COVERAGE, le=MOST_COVERAGE),
    BeforeValidator(partial(check_number, "coverage", LEAST_COVERAGE, MOST_COVERAGE)),
]
Similar = Annotated[int, Field(ge=0, le=MAX_SIMILAR), BeforeValidator(partial(whole_number, "similar", 0, MAX_SIMILAR))]
Test = Annotated[bool, BeforeValidator(partial(check_choice, "test", ("true", "false")))]
HeatmapForm = Literal["rows", "base64", "none"]
Heatmap = Annotated[HeatmapForm, BeforeValidator(partial(check_choice, "heatmap", ("rows", "base64", "none")))]
Example = Annotated[int, Field(ge=0, le=MAX_EXAMPLE), BeforeValidator(partial(whole_number, "example", 0, MAX_EXAMPLE))]
_Length = Field(min_length=1, max_length=MAX_NAME_CHARACTERS)
Target = Annotated[str, _Length, BeforeValidator(partial(check_name, "target"))]
Method = Annotated[str, _Length, BeforeValidator(partial(check_name, "method"))]
Version = Annotated[str, Field(pattern=f"^{VERSION.pattern}$"), BeforeValidator(check_version)]
Model = Annotated[str, Field(pattern=f"^{NAME.pattern}$"), BeforeValidator(check_model)]
_Milliseconds = Annotated[
    int, Field(ge=1, le=MAX_TIMEOUT_MS), BeforeValidator(partial(whole_number, "x-timeout-ms", 1, MAX_TIMEOUT_MS))
]
TimeoutMs = Annotated[_Milliseconds | None, Header(alias="x-timeout-ms", description="Milliseconds to wait, at most.")]


class _Query(BaseModel):
    """The query of one route; its fields are the parameters that the route takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if name not in cls.model_fields:
                raise UnknownParameter(name, tuple(cls.model_fields))
        return values


class PredictQuery(_Query):
    """Options of a prediction."""

    top_k: TopK = 1
    """Number of classes to return, best first."""
    version: Version | None = None
    """Version to ask; by default the gateway chooses."""
    model: Model | None = None
    """Model to ask; by default the plan's default model. GET /models lists them."""


class EvidenceQuery(_Query):
    """Options of the explanation of one image of many."""

    target: Target | None = None
    """Class to explain; default: the predicted one."""
    method: Method | None = None
    """Heatmap method; GET /models lists them."""
    coverage: Coverage | None = None
    """Adds `classes`: the smallest set of classes that holds the right one in this share of images."""
    test: Test = False
    """Adds `test`: the class's confidence with only the hottest quarter of the image kept, and with it blurred."""
    similar: Similar = DEFAULT_SIMILAR
    """Number of nearest training images, of the class and of the second best class each."""
    heatmap: Heatmap = "rows"
    """Form of the heatmap in JSON: rows of numbers, one byte per pixel in base64, or none."""
    version: Version | None = None
    """Version to ask; by default the gateway chooses."""
    model: Model | None = None
    """Model to ask; by default the plan's default model. GET /models lists them."""

    def question(self) -> Question:
        """Return what the query asks about each image."""
        return Question(
            target=self.target, method=self.method, coverage=self.coverage, test=self.test, similar=self.similar
        )


class ExplainQuery(EvidenceQuery):
    """Options of the explanation of one image."""

    alpha: Alpha | None = None
    """Opacity of the heatmap over the image, from 0 to 1."""
    size: Size | None = None
    """Pixels of the overlay's longer side."""

    def overlay_question(self) -> Question:
        """Return what the query asks for an overlay, which shows none of the similar images, `classes` and `test`."""
        alpha = DEFAULTS.alpha if self.alpha is None else self.alpha
        return Question(target=self.target, method=self.method, similar=0, overlay=Overlay(alpha, self.size))


def refuse_repeated(request: Request) -> None:
    """Refuse a query parameter that comes twice, because the caller's intention is unclear.

    Raises:
        BadParameter: a parameter comes twice.
    """
    if not request.scope["query_string"]:
        return
    query = request.query_params
    if len(query.multi_items()) != len(query):
        name = next(name for name in query if len(query.getlist(name)) > 1)
        raise BadParameter(name, ", ".join(query.getlist(name)), "a single value")


def wants_json(accept: str) -> bool:
    """Return True if an Accept header asks for numbers, that is, if it names JSON and no image."""
    return "application/json" in accept and "image/" not in accept
