"""`/predict`, `/predict/batch` and `/explain`: HTTP to the data plane and back, nothing else."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson
from starlette.responses import Response

from contracts import wire
from gateway.api import params
from gateway.api.uploads import read_image, read_images
from gateway.inference.service import Ask
from gateway.inference.torchserve import Deadline
from gateway.request_context import context_of
from gateway.state import AppState, state_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.request_context import RequestContext

OVERLAY_FACTS = ("class", "confidence", "target", "method")
PRINTABLE = string.printable[:-6].replace("%", "") + " "


async def predict(request: Request) -> Response:
    """One image's class."""
    parts, context = state_of(request), context_of(request.scope)
    await parts.callers.admit(request, "predict")
    query = params.query_of(request, ("top_k", "version"))
    top_k = params.top_k_of(query)
    ask = ask_of(request, parts, params.version_of(query))
    image = await _image(request, parts, context)
    entry = await parts.service.predict(image, top_k=top_k, ask=ask)
    context.entries = (entry,)
    response = json_response({**entry, **signature(context)})
    parts.shadow.follow(response, (image,), (entry,), context)
    return response


async def predict_batch(request: Request) -> Response:
    """Many images' classes, in order; an image that has none has its error in its place."""
    parts, context = state_of(request), context_of(request.scope)
    await parts.callers.admit(request, "predict")
    query = params.query_of(request, ("top_k", "version"))
    top_k = params.top_k_of(query)
    ask = ask_of(request, parts, params.version_of(query))
    settings = parts.settings
    with context.stage("body"):
        images = await read_images(
            request,
            max_images=settings.max_batch_images,
            max_image_bytes=settings.max_image_bytes,
            max_bytes=settings.max_batch_bytes,
            timeout_s=settings.body_timeout_s,
        )
    results = await parts.service.predict_batch(images, top_k=top_k, ask=ask)
    context.entries = results
    response = json_response({"results": results, **signature(context)})
    parts.shadow.follow(response, images, results, context)
    return response


async def explain(request: Request) -> Response:
    """Where the model looked: the heatmap over the image, or as numbers."""
    parts, context = state_of(request), context_of(request.scope)
    await parts.callers.admit(request, "explain")
    query = params.query_of(request, ("target", "method", "alpha", "size", "version"))
    asked = params.explain_options_of(query, as_json=params.wants_json(request.headers.get("accept", "")))
    ask = ask_of(request, parts, params.version_of(query))
    image = await _image(request, parts, context)
    answer = await parts.service.explain(image, options=asked, ask=ask)
    if isinstance(answer, bytes):
        headers = {"vary": "accept", **overlay_headers(wire.parse_about(answer)), "x-model-version": context.version}
        return Response(answer, media_type="image/png", headers=headers)
    return json_response({**answer, **signature(context)}, headers={"vary": "accept"})


def ask_of(request: Request, parts: AppState, version: str | None) -> Ask:
    """What the call carries beside its images."""
    deadline = Deadline(params.timeout_of(request, parts.settings.timeout_s))
    return Ask(context_of(request.scope), deadline, version)


def overlay_headers(about: dict[str, Any]) -> dict[str, str]:
    """Return what an overlay explains as headers; what is not printable ASCII in a class's name is percent-encoded."""
    return {f"x-{name}": quote(str(about[name]), safe=PRINTABLE) for name in OVERLAY_FACTS if name in about}


def signature(context: RequestContext) -> dict[str, Any]:
    """Who answered, and under which request id."""
    return {"model": {"name": context.model, "version": context.version}, "request_id": context.request_id}


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:  # noqa: ANN401
    """`data` as compact JSON."""
    return Response(orjson.dumps(data), status_code=status, headers=headers, media_type="application/json")


async def _image(request: Request, parts: AppState, context: RequestContext) -> bytes:
    with context.stage("body"):
        return await read_image(
            request, max_bytes=parts.settings.max_image_bytes, timeout_s=parts.settings.body_timeout_s
        )
