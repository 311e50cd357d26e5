"""`POST /feedback`: the right class of an earlier call's image. The route exists if `GATEWAY_FEEDBACK_FILE` is set."""

from __future__ import annotations

import logging

import orjson
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request

from gateway.api.dependencies import State, require
from gateway.api.openapi import examples
from gateway.api.openapi.responses import FEEDBACK, answers, feedback_body
from gateway.api.schemas import FeedbackCall, FeedbackKept
from gateway.api.uploads import read_body
from gateway.auth.callers import check_may_call
from gateway.errors import Unavailable
from gateway.feedback.store import LoggedCall, StoreError
from gateway.refusals import BadJson, ClassUnknown, EmptyBody, RequestUnknown, RouteUnknown
from gateway.state import AppState

logger = logging.getLogger(__name__)
router = APIRouter(tags=["predictions"])
MAX_BYTES = 8192


@router.post(
    "/feedback",
    summary="The right class of an earlier call's image",
    dependencies=[require("feedback")],
    response_model=FeedbackKept,
    responses=answers(examples.FEEDBACK_KEPT, *FEEDBACK),
    openapi_extra=feedback_body(examples.FEEDBACK),
)
async def feedback(request: Request, state: State) -> dict[str, str]:
    """Keep the right class of the image of an earlier /predict or /explain. A repeat replaces what was said before."""
    body = await read_body(request, max_bytes=MAX_BYTES, timeout_s=state.settings.body_timeout_s)
    said = _parse(body)
    recorder = state.recorder
    if recorder is None:
        raise RouteUnknown
    try:
        call = await recorder.find(said.request_id)
        if call is None:
            raise RequestUnknown(said.request_id, state.settings.feedback_days)
        check_may_call(request.state.caller, call.model)
        classes = _classes(state, call)
        if said.class_name not in classes:
            raise ClassUnknown(said.class_name, classes)
        await recorder.put(said.request_id, said.class_name, said.note, request.state.caller.name)
    except StoreError as error:
        logger.warning("feedback not kept: %s", error)
        raise Unavailable("feedback_store") from error
    return {"request_id": said.request_id, "class": said.class_name}


def _parse(body: bytes) -> FeedbackCall:
    if not body:
        raise EmptyBody
    try:
        return FeedbackCall.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise BadJson("it cannot be parsed") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"])) or "the body"
        raise BadJson(f"{field}: {problem['msg']}") from error


def _classes(state: AppState, call: LoggedCall) -> tuple[str, ...]:
    """Return the classes of the version that answered; of another of that model, if it is loaded no more."""
    seen = [found for _, _, found in state.router.seen() if found.model == call.model]
    contracts = {found.version: found.contract for found in seen if found.contract is not None}
    found = contracts.get(call.version) or next(iter(contracts.values()), None)
    if found is None:
        raise Unavailable("not_ready")
    return tuple(found.classes)
