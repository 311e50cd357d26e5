"""`/predict`, `/predict/batch` and `/explain`: HTTP to the data plane and back, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

from gateway import options
from gateway.dataplane import Ask
from gateway.exchange import exchange_of
from gateway.parts import Parts, parts_of
from gateway.torchserve import Deadline
from gateway.uploads import read_image, read_images

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.exchange import Exchange


async def predict(request: Request) -> Response:
    """One image's class."""
    parts, exchange = parts_of(request), exchange_of(request.scope)
    await parts.callers.admit(request, "predict")
    query = options.query_of(request, ("top_k", "version"))
    top_k = options.top_k_of(query)
    ask = ask_of(request, parts, options.version_of(query))
    image = await _image(request, parts, exchange)
    entry = await parts.dataplane.predict(image, top_k=top_k, ask=ask)
    exchange.entries = (entry,)
    response = json_response({**entry, **signature(exchange)})
    parts.shadow.follow(response, (image,), (entry,), exchange)
    return response


async def predict_batch(request: Request) -> Response:
    """Many images' classes, in order; an image that has none has its error in its place."""
    parts, exchange = parts_of(request), exchange_of(request.scope)
    await parts.callers.admit(request, "predict")
    query = options.query_of(request, ("top_k", "version"))
    top_k = options.top_k_of(query)
    ask = ask_of(request, parts, options.version_of(query))
    settings = parts.settings
    with exchange.stage("body"):
        images = await read_images(
            request,
            max_images=settings.max_batch_images,
            max_image_bytes=settings.max_image_bytes,
            max_bytes=settings.max_batch_bytes,
            timeout_s=settings.body_timeout_s,
        )
    results = await parts.dataplane.predict_batch(images, top_k=top_k, ask=ask)
    exchange.entries = results
    response = json_response({"results": results, **signature(exchange)})
    parts.shadow.follow(response, images, results, exchange)
    return response


async def explain(request: Request) -> Response:
    """Where the model looked: the heatmap over the picture, or as numbers."""
    parts, exchange = parts_of(request), exchange_of(request.scope)
    await parts.callers.admit(request, "explain")
    query = options.query_of(request, ("target", "method", "alpha", "size", "version"))
    asked: dict[str, Any] = options.explain_options_of(query)
    if options.wants_json(request.headers.get("accept", "")):
        asked["format"] = "json"
    ask = ask_of(request, parts, options.version_of(query))
    image = await _image(request, parts, exchange)
    answer = await parts.dataplane.explain(image, options=asked, ask=ask)
    if isinstance(answer, bytes):
        return Response(answer, media_type="image/png", headers={"vary": "accept"})
    return json_response({**answer, **signature(exchange)}, headers={"vary": "accept"})


def ask_of(request: Request, parts: Parts, version: str | None) -> Ask:
    """What the call carries beside its images."""
    deadline = Deadline(options.timeout_of(request, parts.settings.timeout_s))
    return Ask(exchange_of(request.scope), deadline, version)


def signature(exchange: Exchange) -> dict[str, Any]:
    """Who answered, and under which request id."""
    return {"model": {"name": exchange.model, "version": exchange.version}, "request_id": exchange.request_id}


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:  # noqa: ANN401
    """`data` as compact JSON."""
    return Response(orjson.dumps(data), status_code=status, headers=headers, media_type="application/json")


async def _image(request: Request, parts: Parts, exchange: Exchange) -> bytes:
    with exchange.stage("body"):
        return await read_image(
            request, max_bytes=parts.settings.max_image_bytes, timeout_s=parts.settings.body_timeout_s
        )
