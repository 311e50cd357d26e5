"""The OpenAPI document: every route with its parameters, bodies, answers and errors, each with an example.

Written beside the routes instead of derived from them, because the routes read raw requests; a test holds the two
equal. The errors' examples are made by the errors themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from contracts.names import VERSION
from contracts.wire import MAX_OVERLAY_SIDE
from gateway import refusals
from gateway.api import params, schemas
from gateway.api.openapi_examples import BATCH, EXPLANATION, HEALTH, INFER, INFERRED, MODELS, PREDICTION
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
from gateway.settings import VERSION as RELEASE

if TYPE_CHECKING:
    from gateway.settings import Settings

JSON = "application/json"
ANSWERS = (
    schemas.Prediction,
    schemas.BatchPrediction,
    schemas.Explanation,
    schemas.Problem,
    schemas.Health,
    schemas.Models,
    schemas.State,
)
BINARY = {"type": "string", "format": "binary"}
# Where a quota was counted.
QUOTA_HEADERS = {
    "RateLimit-Policy": {"schema": {"type": "string"}, "example": '"key";q=600;w=60'},
    "RateLimit": {"schema": {"type": "string"}, "example": '"key";r=599;t=42'},
}

AUTHENTICATION = (
    refusals.KeyMissing(),
    refusals.KeyUnknown(),
    refusals.KeyExpired("2026-12-31T00:00:00+00:00"),
)
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
EXPLAIN = (
    ImageRefused("unknown_target", "there is no class 'unicorn': use one of the model's classes", {}),
    ImageRefused("unknown_method", "there is no method 'x': use gradcam, eigencam", {}),
)
V2 = (refusals.BadJson("`inputs` does not hold exactly one tensor"), refusals.ModelUnknown("other"))
OVERLAY_HEADERS = {
    f"x-{name}": {"description": f"Of an image: {what}.", "schema": {"type": "string"}}
    for name, what in {
        "class": "the predicted class",
        "confidence": "its confidence",
        "target": "the class that is explained",
        "method": "the CAM method",
        "model-version": "the version that answered",
    }.items()
}
TAGS = {
    "predictions": "Classes of images, and where the model looked.",
    "state": "What serves, and how it fares.",
    "v2": "The Open Inference Protocol V2, for Triton's and KServe's clients.",
}
# By path, as each has one method: the name of the method in a generated client, and its group there.
OPERATIONS = {
    "/predict": ("predict", "predictions"),
    "/predict/batch": ("predict_batch", "predictions"),
    "/explain": ("explain", "predictions"),
    "/health": ("health", "state"),
    "/livez": ("livez", "state"),
    "/readyz": ("readyz", "state"),
    "/models": ("models", "state"),
    "/metrics": ("metrics", "state"),
    "/v2": ("v2_server", "v2"),
    "/v2/health/live": ("v2_live", "v2"),
    "/v2/health/ready": ("v2_ready", "v2"),
    "/v2/models/{model}": ("v2_model", "v2"),
    "/v2/models/{model}/ready": ("v2_model_ready", "v2"),
    "/v2/models/{model}/infer": ("v2_infer", "v2"),
    "/v2/models/{model}/versions/{version}": ("v2_version", "v2"),
    "/v2/models/{model}/versions/{version}/ready": ("v2_version_ready", "v2"),
    "/v2/models/{model}/versions/{version}/infer": ("v2_version_infer", "v2"),
}


def document(settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a gateway with these settings."""
    _, definitions = models_json_schema(
        [(model, "serialization") for model in ANSWERS], ref_template="#/components/schemas/{model}"
    )
    paths = {
        path: {method: _named(path, operation) for method, operation in methods.items()}
        for path, methods in (_image_paths(settings) | _state_paths() | _v2_paths()).items()
    }
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if settings.asks_for_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    else:
        paths = {path: {method: _without_keys(op) for method, op in methods.items()} for path, methods in paths.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gradserve",
            "version": RELEASE,
            "description": "Classifies images and shows where the model looked. Errors are RFC 9457 problem documents.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": description} for name, description in TAGS.items()],
        "paths": paths,
        "components": components,
    }


def _image_paths(settings: Settings) -> dict[str, Any]:
    top_k = _query(
        "top_k", "Classes to name, best first.", type="integer", minimum=1, maximum=params.MAX_TOP_K, default=1
    )
    version = _query("version", "A version by name; default: whose turn it is.", **_pattern())
    name = {"type": "string", "minLength": 1, "maxLength": params.MAX_NAME_CHARACTERS}
    explain = [
        _query("target", "Class to explain; default: the predicted one.", **name),
        _query("method", "CAM method; GET /models lists them.", **name),
        _query("alpha", "How strongly the heatmap covers the image.", type="number", minimum=0, maximum=1),
        _query("size", "Pixels of the overlay's long side.", type="integer", minimum=1, maximum=MAX_OVERLAY_SIDE),
    ]
    single = (*GUARD, *BODY, *ENGINE, *IMAGE)
    explained = _ok({"image/png": {"schema": BINARY}, JSON: _example(schemas.Explanation, EXPLANATION)})
    explained["200"]["headers"] = OVERLAY_HEADERS
    return {
        "/predict": {
            "post": _operation(
                "One image's class",
                _ok({JSON: _example(schemas.Prediction, PREDICTION)}),
                single,
                parameters=[top_k, version, _timeout()],
                body=_image_body(),
            )
        },
        "/predict/batch": {
            "post": _operation(
                f"The classes of up to {settings.max_batch_images} images, in order",
                _ok({JSON: _example(schemas.BatchPrediction, BATCH)}),
                (*GUARD, *BODY, *ENGINE),
                parameters=[top_k, version, _timeout()],
                body={"multipart/form-data": {"schema": _form({"type": "array", "items": BINARY, "minItems": 1})}},
            )
        },
        "/explain": {
            "post": _operation(
                "Where the model looked: the heatmap over the image, or as numbers with `Accept: application/json`",
                explained,
                (*single, *EXPLAIN),
                parameters=[*explain, version, _timeout()],
                body=_image_body(),
            )
        },
    }


def _state_paths() -> dict[str, Any]:
    state = {JSON: {"schema": _reference(schemas.State)}}
    health = {JSON: _example(schemas.Health, HEALTH)}
    unavailable = {"503": {"description": "The stable version does not answer", "content": health}}
    probe = (Unavailable("not_ready"), Unavailable("draining"))
    return {
        "/health": {"get": _operation("What serves", _ok(health) | unavailable, (), is_open=True)},
        "/livez": {"get": _operation("The process is alive", _ok(state), (), is_open=True)},
        "/readyz": {"get": _operation("Calls can be sent here", _ok(state), probe, is_open=True)},
        "/models": {"get": _operation("The versions", _ok({JSON: _example(schemas.Models, MODELS)}), GUARD)},
        "/metrics": {
            "get": _operation("Prometheus metrics", _ok({"text/plain": {"schema": {"type": "string"}}}), GUARD)
        },
    }


def _v2_paths() -> dict[str, Any]:
    anything = {JSON: {"schema": {"type": "object"}}}
    probe = (Unavailable("not_ready"), Unavailable("draining"))
    of_version = (*GUARD, *V2, refusals.BadParameter("version", "-", "a version, like 1.0.0"), *ENGINE)
    infer = {JSON: {"schema": _infer_request(), "example": INFER}, "application/octet-stream": {"schema": BINARY}}
    inferred = {
        JSON: {"schema": {"type": "object"}, "example": INFERRED},
        "application/octet-stream": {"schema": BINARY},
    }
    errors = (*of_version, *IMAGE, refusals.EmptyBody(), refusals.BodyTooLarge(33_554_432), refusals.BodyTooSlow(10))
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    version = {"name": "version", "in": "path", "required": True, "schema": _pattern()}
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("V2: the server", _ok(anything), GUARD)},
        "/v2/health/live": {"get": _operation("V2: the process is alive", _ok(anything), (), is_open=True)},
        "/v2/health/ready": {"get": _operation("V2: calls can be sent here", _ok(anything), probe, is_open=True)},
    }
    for prefix, parameters in (
        ("/v2/models/{model}", [model]),
        ("/v2/models/{model}/versions/{version}", [model, version]),
    ):
        paths[prefix] = {"get": _operation("V2: the model", _ok(anything), of_version, parameters=parameters)}
        paths[f"{prefix}/ready"] = {
            "get": _operation("V2: the model answers", _ok(anything), of_version, parameters=parameters)
        }
        paths[f"{prefix}/infer"] = {
            "post": _operation(
                "V2: the images' classes; `shape` is the number of images. As octet-stream: the JSON, then the binary "
                "tensor, with the JSON's length in Inference-Header-Content-Length",
                _ok(inferred),
                errors,
                parameters=[*parameters, _timeout()],
                body=infer,
            )
        }
    return paths


def _operation(
    summary: str,
    answers: dict[str, Any],
    errors: tuple[GatewayError, ...],
    *,
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
    is_open: bool = False,
) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": answers | _problems(errors)}
    if not is_open:
        operation["security"] = [{"bearer": []}, {"header": []}]
        for status in ("200", "429"):
            answer = operation["responses"][status]
            operation["responses"][status] = {**answer, "headers": {**answer.get("headers", {}), **QUOTA_HEADERS}}
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _named(path: str, operation: dict[str, Any]) -> dict[str, Any]:
    name, tag = OPERATIONS[path]
    return {"operationId": name, "tags": [tag], **operation}


def _without_keys(operation: dict[str, Any]) -> dict[str, Any]:
    """The operation of a gateway that has no keys, where none are asked for and none are refused."""
    answers = {status: answer for status, answer in operation["responses"].items() if status not in {"401", "403"}}
    return {name: value for name, value in operation.items() if name != "security"} | {"responses": answers}


def _problems(errors: tuple[GatewayError, ...]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for error in errors:
        problem = {**error.problem(), "request_id": "0f4c0e8a6f8d4b0c8d9e5c1f0a2b3c4d"}
        content = {"schema": _reference(schemas.Problem), "examples": {}}
        response = responses.setdefault(
            str(error.status),
            {"description": problem["title"], "content": {"application/problem+json": content}, "headers": {}},
        )
        response["content"]["application/problem+json"]["examples"][error.code] = {"value": problem}
        for header in error.headers:
            response["headers"][header] = {"schema": {"type": "string"}}
    return responses


def _ok(content: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": "OK", "content": content}}


def _reference(model: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _example(model: type, example: dict[str, Any]) -> dict[str, Any]:
    return {"schema": _reference(model), "example": example}


def _query(name: str, description: str, **schema: object) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _pattern() -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{VERSION.pattern}$"}


def _timeout() -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": params.MAX_TIMEOUT_MS}
    return {"name": "x-timeout-ms", "in": "header", "description": "Milliseconds to wait, at most.", "schema": schema}


def _infer_request() -> dict[str, Any]:
    tensor = {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"const": "image"},
            "datatype": {"const": "BYTES"},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 1},
            "data": {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}, "minItems": 1},
        },
    }
    output = {"type": "object", "required": ["name"], "properties": {"name": {"enum": ["class", "confidence"]}}}
    top_k = {"type": "integer", "minimum": 1, "maximum": params.MAX_TOP_K}
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "outputs": {"type": "array", "items": output},
            "parameters": {"type": "object", "properties": {"top_k": top_k}},
        },
    }


def _form(file: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["file"], "properties": {"file": file}, "additionalProperties": False}


def _image_body() -> dict[str, Any]:
    types = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "application/octet-stream")
    image = {**BINARY, "minLength": 1}
    return {media_type: {"schema": image} for media_type in types} | {"multipart/form-data": {"schema": _form(BINARY)}}
