"""`/predict`, `/predict/batch` and `/explain`: translate HTTP to the inference service and back.

These routes return finished responses, because FastAPI's validation of each answer would make every call slower. A test
checks real answers against the schemas.
"""

from __future__ import annotations

import string
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from contracts import wire
from gateway.api.dependencies import Admitted, accept, admit
from gateway.api.openapi import examples
from gateway.api.openapi.responses import (
    BINARY,
    BODY,
    ENGINE,
    EXPLAIN,
    GUARD,
    IMAGE,
    OVERLAY_HEADERS,
    answers,
    batch_body,
    image_body,
)
from gateway.api.params import ExplainQuery, PredictQuery, wants_json
from gateway.api.schemas import BatchPrediction, Explanation, Prediction
from gateway.api.uploads import read_image, read_images
from gateway.inference.answer import Answer
from gateway.state import AppState

router = APIRouter(tags=["predictions"])
OVERLAY_FACTS = ("class", "confidence", "target", "method")
PRINTABLE = string.printable[:-6].replace("%", "") + " "
SINGLE = (*GUARD, *BODY, *ENGINE, *IMAGE)


@router.post(
    "/predict",
    summary="One image's class",
    response_model=Prediction,
    responses=answers(examples.PREDICTION, *SINGLE),
    openapi_extra=image_body(),
)
async def predict(
    request: Request, admitted: Annotated[Admitted, admit("predict")], query: Annotated[PredictQuery, Query()]
) -> Response:
    """Name the class of one image, with the model's calibrated confidence."""
    state, request_id, call = admitted
    image = await _image(request, state)
    answer = accept(
        request, await state.service.predict(image, top_k=query.top_k, call=call.of(query.version, query.model))
    )
    response = json_response({**answer.entries[0], **signature(answer, request_id)})
    if state.recorder is not None:
        state.recorder.note(request_id, image, answer.entries[0], (answer.model, answer.version), request.headers)
    state.shadow.follow(response, (image,), answer, request_id)
    return response


@router.post(
    "/predict/batch",
    summary="The classes of many images, in order",
    response_model=BatchPrediction,
    responses=answers(examples.BATCH, *GUARD, *BODY, *ENGINE),
    openapi_extra=batch_body(),
)
async def predict_batch(
    request: Request, admitted: Annotated[Admitted, admit("predict")], query: Annotated[PredictQuery, Query()]
) -> Response:
    """Name the class of each image, in order. The entry of an image that failed is its error."""
    state, request_id, call = admitted
    settings = state.settings
    images = await read_images(
        request,
        max_images=settings.max_batch_images,
        max_image_bytes=settings.max_image_bytes,
        max_bytes=settings.max_batch_bytes,
        timeout_s=settings.body_timeout_s,
    )
    answer = accept(
        request, await state.service.predict_batch(images, top_k=query.top_k, call=call.of(query.version, query.model))
    )
    response = json_response({"results": answer.entries, **signature(answer, request_id)})
    state.shadow.follow(response, images, answer, request_id)
    return response


@router.post(
    "/explain",
    summary="Where the model looked: the heatmap over the image, or as numbers with `Accept: application/json`",
    response_model=Explanation,
    responses=answers(
        examples.EXPLANATION, *SINGLE, *EXPLAIN, other={"image/png": {"schema": BINARY}}, headers=OVERLAY_HEADERS
    ),
    openapi_extra=image_body(),
)
async def explain(
    request: Request, admitted: Annotated[Admitted, admit("explain")], query: Annotated[ExplainQuery, Query()]
) -> Response:
    """Show where the model looked for a class: a PNG overlay, or the heatmap as numbers."""
    state, request_id, call = admitted
    options = query.options(as_json=wants_json(request.headers.get("accept", "")))
    image = await _image(request, state)
    answer = accept(
        request, await state.service.explain(image, options=options, call=call.of(query.version, query.model))
    )
    if answer.overlay is not None:
        facts = overlay_headers(wire.parse_about(answer.overlay))
        headers = {"vary": "accept", **facts, "x-model-version": answer.version}
        return Response(answer.overlay, media_type="image/png", headers=headers)
    return json_response({**answer.entries[0], **signature(answer, request_id)}, headers={"vary": "accept"})


def overlay_headers(about: dict[str, Any]) -> dict[str, str]:
    """Return an overlay's facts as headers; characters of a class name that are not printable are percent-encoded."""
    return {f"x-{name}": quote(str(about[name]), safe=PRINTABLE) for name in OVERLAY_FACTS if name in about}


def signature(answer: Answer, request_id: str) -> dict[str, Any]:
    """Return the members that name the model, the version and the request."""
    return {"model": {"name": answer.model, "version": answer.version}, "request_id": request_id}


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:  # noqa: ANN401
    """Return `data` as compact JSON."""
    return Response(orjson.dumps(data), status_code=status, headers=headers, media_type="application/json")


async def _image(request: Request, state: AppState) -> bytes:
    return await read_image(request, max_bytes=state.settings.max_image_bytes, timeout_s=state.settings.body_timeout_s)
