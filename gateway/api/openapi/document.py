"""Complete FastAPI's OpenAPI document with what FastAPI cannot know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from gateway.api.schemas import FeedbackCall, InferCall, Problem
from gateway.settings import VERSION

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel

    from gateway.settings import Settings

TAGS = [
    {"name": "predictions", "description": "Classes of images."},
    {"name": "explanations", "description": "Evidence for a class: heatmaps, similar training images, answer sets."},
    {"name": "state", "description": "The versions that serve, their health, and metrics."},
    {"name": "v2", "description": "The Open Inference Protocol V2, for Triton's and KServe's clients."},
]
_UNUSED = ("HTTPValidationError", "ValidationError")  # FastAPI's own errors; ours are problem documents


def document(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a gateway with these settings.

    The document of a gateway without keys has no security schemes and no 401 or 403.
    """
    found = get_openapi(
        title="gradserve",
        version=VERSION,
        description="Classifies images and shows where the model looked. Errors are RFC 9457 problem documents.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        routes=app.routes,
        tags=TAGS,
    )
    schemas = found["components"]["schemas"]
    bodies: list[type[BaseModel]] = [Problem, InferCall, *([FeedbackCall] if settings.feedback_file else [])]
    _, referred = models_json_schema(
        [(model, "serialization") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas |= referred["$defs"]
    for name in _UNUSED:
        schemas.pop(name, None)
    for operation in (operation for methods in found["paths"].values() for operation in methods.values()):
        responses = operation["responses"]
        # JSON, the default, comes first: a generated client takes the first content type for the answer's type.
        content = responses["200"].get("content", {})
        responses["200"]["content"] = dict(sorted(content.items(), key=lambda item: not item[0].startswith("image/")))
        for parameter in operation.get("parameters", ()):
            _drop_null(parameter)
        if _UNUSED[0] in str(responses.get("422")):
            del responses["422"]
        if not settings.asks_for_keys:
            operation.pop("security", None)
            for status in ("401", "403"):
                responses.pop(status, None)
    if not settings.asks_for_keys:
        found["components"].pop("securitySchemes", None)
    return found


def _drop_null(parameter: dict[str, Any]) -> None:
    """Remove null from a parameter's types: a caller leaves an optional parameter out, and cannot send null."""
    choices = parameter["schema"].pop("anyOf", [])
    for choice in choices:
        if choice != {"type": "null"}:
            parameter["schema"] |= choice
