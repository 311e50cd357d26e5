"""The errors that routes declare in the OpenAPI document, each with an example made by the error's own class."""

from __future__ import annotations

from typing import Any

from gateway import refusals
from gateway.errors import (
    DeadlinePassed,
    EngineBroke,
    EngineNonsense,
    GatewayError,
    HandlerFailed,
    ImageRefused,
    Internal,
    Unavailable,
)

JSON = "application/json"
PROBLEM = "application/problem+json"
BINARY = {"type": "string", "format": "binary"}
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "application/octet-stream")

AUTHENTICATION = (refusals.KeyMissing(), refusals.KeyUnknown(), refusals.KeyExpired("2026-12-31T00:00:00+00:00"))
GUARD = (*AUTHENTICATION, refusals.ScopeMissing("predict"), refusals.QuotaExceeded("600 per 1 minute", 12))
BODY = (
    refusals.EmptyBody(),
    refusals.BadMultipart("its closing boundary is missing"),
    refusals.MissingFile(),
    refusals.UnexpectedField("top_k"),
    refusals.TooManyFiles(1),
    refusals.BadParameter("top_k", "0", "a whole number from 1 to 1000"),
    refusals.BodyTooSlow(10),
    refusals.BodyTooLarge(6_291_456),
    refusals.MediaTypeUnsupported("text/plain", "http://localhost:8000/predict"),
)
ENGINE = (
    refusals.ModelForbidden("other", ("cifar10",)),
    refusals.VersionUnknown("9.9.9"),
    HandlerFailed(),
    Internal(),
    EngineNonsense(),
    EngineBroke(),
    Unavailable("saturated"),
    Unavailable("not_ready"),
    DeadlinePassed(10),
)
IMAGE = (
    refusals.ImageTooLarge(10_000, 10_000, max_pixels=25_000_000, max_side=16_384, max_aspect=2_000),
    refusals.TooManyPixels(250_000_000, 200_000_000),
    refusals.CallerHasTooManyPixels(200_000_000),
    ImageRefused("image_unreadable", "the bytes are no image: send a whole PNG, JPEG, WebP, BMP or GIF image", {}),
)
SINGLE = (*GUARD, *BODY, *ENGINE, *IMAGE)
EXPLAIN = (
    ImageRefused("unknown_target", "there is no class 'unicorn': use one of cat, dog", {}),
    ImageRefused("unknown_method", "there is no method 'x': use cam, gradcam", {}),
    refusals.BadParameter("coverage", "1", "a number from 0.5 to 0.999"),
)
EXAMPLE = (
    *AUTHENTICATION,
    refusals.ScopeMissing("explain"),
    refusals.QuotaExceeded("600 per 1 minute", 12),
    refusals.BadParameter("example", "x", "a whole number from 0 to 10000000"),
    refusals.ModelUnknown("other"),
    refusals.ExampleUnknown(999_999, "1.0.0", 1000),
    *ENGINE,
)
OVERLAY_HEADERS = {
    f"x-{name}": {"description": f"Of an image: {what}.", "schema": {"type": "string"}}
    for name, what in {
        "class": "the predicted class",
        "confidence": "its confidence",
        "target": "the class that is explained",
        "method": "the heatmap's method",
        "familiar": "whether the image is like the training images: true or false",
        "model-version": "the version that answered",
    }.items()
}
FEEDBACK = (
    *AUTHENTICATION,
    refusals.ScopeMissing("feedback"),
    refusals.ModelForbidden("other", ("cifar10",)),
    refusals.QuotaExceeded("600 per 1 minute", 12),
    refusals.EmptyBody(),
    refusals.BadJson("class: Field required"),
    refusals.ClassUnknown("unicorn", ("cat", "dog")),
    refusals.RequestUnknown("0f4c0e8a6f8d4b0c8d9e5c1f0a2b3c4d", 30),
    refusals.BodyTooLarge(8192),
    refusals.BodyTooSlow(10),
    Unavailable("feedback_store"),
    Unavailable("not_ready"),
)
PROBE = (Unavailable("not_ready"), Unavailable("draining"))
V2_MODEL = (
    *GUARD,
    refusals.BadJson("`inputs` does not hold exactly one tensor"),
    refusals.ModelUnknown("other"),
    refusals.BadParameter("version", "-", "a version, like 1.0.0"),
    *ENGINE,
)
V2_INFER = (*V2_MODEL, *IMAGE, refusals.EmptyBody(), refusals.BodyTooLarge(33_554_432), refusals.BodyTooSlow(10))


def problems(*errors: GatewayError) -> dict[int | str, dict[str, Any]]:
    """Return the declared responses of a route that can refuse or fail with `errors`."""
    responses: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        problem = {**error.problem(), "request_id": "0f4c0e8a6f8d4b0c8d9e5c1f0a2b3c4d"}
        response = responses.setdefault(
            error.status,
            {
                "description": problem["title"],
                "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
                "headers": {},
            },
        )
        response["content"][PROBLEM]["examples"][error.code] = {"value": problem}
        for header in error.headers:
            response["headers"][header] = {"schema": {"type": "string"}}
    return responses


def answers(
    example: dict[str, Any],
    *errors: GatewayError,
    other: dict[str, Any] | None = None,
    headers: dict[str, Any] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """Return the declared responses of a route: a JSON answer with an example, `other` content types, its errors."""
    content = {JSON: {"example": example}} | (other or {})
    return {200: {"content": content} | ({"headers": headers} if headers else {}), **problems(*errors)}


def image_body() -> dict[str, Any]:
    """Return the declared body of a route that takes one image: the raw bytes, or multipart with the field `file`."""
    raw = {media_type: {"schema": {**BINARY, "minLength": 1}} for media_type in IMAGE_TYPES}
    return _secured_body(raw | {"multipart/form-data": {"schema": _form(BINARY)}})


def batch_body() -> dict[str, Any]:
    """Return the declared body of a route that takes many images: multipart, the field `file` repeated."""
    form = _form({"type": "array", "items": BINARY, "minItems": 1})
    return _secured_body({"multipart/form-data": {"schema": form}})


def feedback_body(example: dict[str, Any]) -> dict[str, Any]:
    """Return the declared body of the route that takes feedback."""
    return _secured_body({JSON: {"schema": {"$ref": "#/components/schemas/FeedbackCall"}, "example": example}})


def infer_body(example: dict[str, Any]) -> dict[str, Any]:
    """Return the declared body of the V2 protocol: JSON, or JSON followed by a binary tensor."""
    content = {JSON: {"schema": {"$ref": "#/components/schemas/InferCall"}, "example": example}}
    return _secured_body(content | {"application/octet-stream": {"schema": BINARY}})


def _secured_body(content: dict[str, Any]) -> dict[str, Any]:
    """Return what a route adds to its OpenAPI operation: its body, and the two headers that can carry a key."""
    return {"requestBody": {"required": True, "content": content}, "security": [{"bearer": []}, {"header": []}]}


def _form(file: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["file"], "properties": {"file": file}, "additionalProperties": False}
