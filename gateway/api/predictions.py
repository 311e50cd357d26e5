"""`/predict` and `/predict/batch`: translate HTTP to the inference service and back.

These routes return finished responses, because FastAPI's validation of each answer would make every call slower. A test
checks real answers against the schemas.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.dependencies import Admitted, accept, admit
from gateway.api.openapi import examples
from gateway.api.openapi.responses import BODY, ENGINE, GUARD, SINGLE, answers, batch_body, image_body
from gateway.api.params import PredictQuery
from gateway.api.schemas import BatchPrediction, Prediction
from gateway.api.uploads import read_image, read_images
from gateway.inference.answer import Answer
from gateway.state import AppState

router = APIRouter(tags=["predictions"])


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
    image = await read_one(request, state)
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
    images = await read_many(request, state)
    answer = accept(
        request, await state.service.predict_batch(images, top_k=query.top_k, call=call.of(query.version, query.model))
    )
    response = json_response({"results": answer.entries, **signature(answer, request_id)})
    state.shadow.follow(response, images, answer, request_id)
    return response


def signature(answer: Answer, request_id: str) -> dict[str, Any]:
    """Return the members that name the model, the version and the request."""
    return {"model": {"name": answer.model, "version": answer.version}, "request_id": request_id}


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:  # noqa: ANN401
    """Return `data` as compact JSON."""
    return Response(orjson.dumps(data), status_code=status, headers=headers, media_type="application/json")


async def read_one(request: Request, state: AppState) -> bytes:
    """Return the one image of a call."""
    return await read_image(request, max_bytes=state.settings.max_image_bytes, timeout_s=state.settings.body_timeout_s)


async def read_many(request: Request, state: AppState) -> list[bytes]:
    """Return the images of a call with many."""
    settings = state.settings
    return await read_images(
        request,
        max_images=settings.max_batch_images,
        max_image_bytes=settings.max_image_bytes,
        max_bytes=settings.max_batch_bytes,
        timeout_s=settings.body_timeout_s,
    )
