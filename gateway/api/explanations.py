"""`/explain`, `/explain/batch` and the training images that explanations name: translate HTTP to the service and back.

The routes return finished responses, as those in gateway/api/predictions.py.
"""

from __future__ import annotations

import string
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from contracts import wire
from gateway.api.dependencies import Admitted, accept, admit
from gateway.api.evidence import write_documents
from gateway.api.openapi import examples
from gateway.api.openapi.responses import (
    BINARY,
    BODY,
    ENGINE,
    EXAMPLE,
    EXPLAIN,
    GUARD,
    OVERLAY_HEADERS,
    SINGLE,
    answers,
    batch_body,
    image_body,
    problems,
)
from gateway.api.params import EvidenceQuery, Example, ExplainQuery, Model, Version, wants_json
from gateway.api.predictions import json_response, read_many, read_one, signature
from gateway.api.schemas import BatchExplanation, Explanation

router = APIRouter(tags=["explanations"])
OVERLAY_FACTS = ("class", "confidence", "target", "method", "familiar")
PRINTABLE = string.printable[:-6].replace("%", "") + " "
PNG = {"image/png": {"schema": BINARY}}
EXAMPLE_MAX_AGE_S = 86_400


@router.post(
    "/explain",
    summary="An image's class and the evidence for it: as numbers with `Accept: application/json`, else as an image",
    response_model=Explanation,
    responses=answers(examples.EXPLANATION, *SINGLE, *EXPLAIN, other=PNG, headers=OVERLAY_HEADERS),
    openapi_extra=image_body(),
)
async def explain(
    request: Request, admitted: Annotated[Admitted, admit("explain")], query: Annotated[ExplainQuery, Query()]
) -> Response:
    """Show the evidence for a class: a PNG with the heatmap over the image, or all of the evidence as JSON."""
    state, request_id, call = admitted
    as_json = wants_json(request.headers.get("accept", ""))
    question = query.question() if as_json else query.overlay_question()
    image = await read_one(request, state)
    answer = accept(request, await state.service.explain(image, question, call=call.of(query.version, query.model)))
    if answer.overlay is not None:
        about = wire.parse_about(answer.overlay)
        if state.recorder is not None and about:
            state.recorder.note(request_id, image, about, (answer.model, answer.version), request.headers)
        facts = overlay_headers(about)
        headers = {"vary": "accept", **facts, "x-model-version": answer.version}
        return Response(answer.overlay, media_type=wire.PNG_TYPE, headers=headers)
    (document,) = write_documents(answer, query)
    response = json_response({**document, **signature(answer, request_id)}, headers={"vary": "accept"})
    state.shadow.follow(response, (image,), answer, request_id)
    if state.recorder is not None:
        state.recorder.note(request_id, image, answer.entries[0], (answer.model, answer.version), request.headers)
    return response


@router.post(
    "/explain/batch",
    summary="The evidence for many images, in order",
    response_model=BatchExplanation,
    responses=answers(examples.EXPLAINED_BATCH, *GUARD, *BODY, *ENGINE, *EXPLAIN),
    openapi_extra=batch_body(),
)
async def explain_batch(
    request: Request, admitted: Annotated[Admitted, admit("explain")], query: Annotated[EvidenceQuery, Query()]
) -> Response:
    """Give the evidence for each image, in order. The entry of an image that failed is its error."""
    state, request_id, call = admitted
    images = await read_many(request, state)
    answer = accept(
        request, await state.service.explain_batch(images, query.question(), call=call.of(query.version, query.model))
    )
    response = json_response({"results": write_documents(answer, query), **signature(answer, request_id)})
    state.shadow.follow(response, images, answer, request_id)
    return response


@router.get(
    "/models/{model}/versions/{version}/examples/{example}.png",
    summary="A training image that an explanation names",
    response_class=Response,
    responses={200: {"content": PNG}, 304: {"description": "Not Modified", "content": {}}, **problems(*EXAMPLE)},
)
async def example(
    request: Request,
    admitted: Annotated[Admitted, admit("explain")],
    model: Annotated[Model, Path()],
    version: Annotated[Version, Path()],
    example: Annotated[Example, Path()],
) -> Response:
    """Send the thumbnail of a training image, as a PNG."""
    state, _, call = admitted
    content = await state.examples.find(example, call.of(version, model))
    etag = f'"{state.examples.digest(model, version)[:16]}-{example}"'
    headers = {"etag": etag, "cache-control": f"private, max-age={EXAMPLE_MAX_AGE_S}"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=wire.PNG_TYPE, headers=headers)


def overlay_headers(about: dict[str, Any]) -> dict[str, str]:
    """Return an overlay's facts as headers; characters of a class name that are not printable are percent-encoded."""
    target = about.get("target")
    told = {**about, "target": target["class"]} if isinstance(target, dict) else about
    if isinstance(told.get("familiar"), bool):
        told = {**told, "familiar": str(told["familiar"]).lower()}
    facts = {name: told[name] for name in OVERLAY_FACTS if isinstance(told.get(name), str | float | int)}
    return {f"x-{name}": quote(str(fact), safe=PRINTABLE) for name, fact in facts.items()}
