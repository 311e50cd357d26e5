"""The Open Inference Protocol V2 over HTTP, so that Triton's and KServe's clients work unchanged.

The input is `image` (BYTES, shape [n]: whole image files). The outputs are `class` (BYTES) and `confidence` (FP32),
both of shape [n], or [n, top_k] if the request parameter `top_k` is above 1; and if the call names them, of shape [n]:
`familiar` (BOOL), `familiarity` (FP32), and `classes` (BYTES: the answer set for the parameter `coverage`, as JSON).
Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.dependencies import Admitted, State, accept, admit, require
from gateway.api.health import refuse_unready
from gateway.api.openapi import examples
from gateway.api.openapi.responses import BINARY, GUARD, PROBE, V2_INFER, V2_MODEL, answers, infer_body, problems
from gateway.api.params import Version
from gateway.api.uploads import read_body
from gateway.api.v2 import tensors
from gateway.inference.questions import forward_methods
from gateway.refusals import VersionUnknown
from gateway.settings import VERSION
from gateway.state import AppState

router = APIRouter(prefix="/v2", tags=["v2"])
MODEL, OF_VERSION = "/models/{model}", "/models/{model}/versions/{version}"
INFER: dict[str, Any] = {
    "summary": "V2: the images' classes",
    "response_model": dict[str, Any],
    "responses": answers(examples.INFERRED, *V2_INFER, other={"application/octet-stream": {"schema": BINARY}}),
    "openapi_extra": infer_body(examples.INFER),
}
ABOUT: dict[str, Any] = {"dependencies": [require("predict")], "responses": problems(*V2_MODEL)}
PathVersion = Annotated[Version, Path()]


async def _model(state: State, model: str) -> str:
    return state.router.plan_of(model).model


Model = Annotated[str, Depends(_model)]  # the model in the path; the plan serves it


@router.get(
    "", name="v2_server", summary="V2: the server", dependencies=[require("predict")], responses=problems(*GUARD)
)
async def server() -> dict[str, Any]:
    """Return the server's metadata."""
    return {"name": "gradserve", "version": VERSION, "extensions": ["binary_tensor_data"]}


@router.get("/health/live", name="v2_live", summary="V2: the process is alive")
async def live() -> dict[str, bool]:
    """Answer 200 while the process runs."""
    return {"live": True}


@router.get("/health/ready", name="v2_ready", summary="V2: calls can be sent here", responses=problems(*PROBE))
async def ready(state: State) -> dict[str, bool]:
    """Answer 200 while the stable version is ready."""
    refuse_unready(state)
    return {"ready": True}


@router.get(MODEL, name="v2_model", summary="V2: the model", **ABOUT)
async def model_metadata(state: State, model: Model) -> dict[str, Any]:
    """Return the model's name, versions, input and outputs."""
    return _metadata(state, model, _versions(state, model))


@router.get(OF_VERSION, name="v2_version", summary="V2: one version", **ABOUT)
async def version_metadata(state: State, model: Model, version: PathVersion) -> dict[str, Any]:
    """Return the metadata of one version."""
    if version not in _versions(state, model):
        raise VersionUnknown(version)
    return _metadata(state, model, [version])


@router.get(f"{MODEL}/ready", name="v2_model_ready", summary="V2: the model is ready", **ABOUT)
async def model_ready(state: State, model: Model) -> dict[str, Any]:
    """Answer 200 while the version that a call would get is ready."""
    return _readiness(state, model, None)


@router.get(f"{OF_VERSION}/ready", name="v2_version_ready", summary="V2: the version is ready", **ABOUT)
async def version_ready(state: State, model: Model, version: PathVersion) -> dict[str, Any]:
    """Answer 200 while this version is ready."""
    return _readiness(state, model, version)


@router.post(f"{MODEL}/infer", name="v2_infer", **INFER)
async def infer(request: Request, admitted: Annotated[Admitted, admit("predict")], model: Model) -> Response:
    """Name the classes of the images in the input tensor; if one image fails, the call fails.

    `shape` is the number of images. As octet-stream the body is the JSON, then the binary tensor, with the JSON's
    length in the header Inference-Header-Content-Length.
    """
    return await _infer(request, admitted, model, None)


@router.post(f"{OF_VERSION}/infer", name="v2_version_infer", **INFER)
async def infer_by(
    request: Request, admitted: Annotated[Admitted, admit("predict")], model: Model, version: PathVersion
) -> Response:
    """Name the classes of the images by one version."""
    return await _infer(request, admitted, model, version)


async def _infer(request: Request, admitted: Admitted, model: str, version: str | None) -> Response:
    state, request_id, call = admitted
    infer_request = await _read(request, state)
    images, top_k, question = infer_request.images, infer_request.top_k, infer_request.question()
    answer = await state.service.predict_batch(images, top_k=top_k, call=call.of(version, model), question=question)
    accept(request, answer)
    tensors.raise_for_failed(answer.entries)
    head: dict[str, Any] = {"model_name": model, "model_version": answer.version}
    if infer_request.id:
        head["id"] = infer_request.id
    content, header_length = tensors.write_response(head, answer.entries, infer_request)
    if header_length is None:
        response = Response(content, media_type="application/json")
    else:
        response = Response(
            content,
            media_type="application/octet-stream",
            headers={"inference-header-content-length": str(header_length)},
        )
    state.shadow.follow(response, images, answer, request_id)
    return response


async def _read(request: Request, state: AppState) -> tensors.InferRequest:
    """Return the parsed call. The images are copies, so that the body's memory is freed on return."""
    settings = state.settings
    body = await read_body(request, max_bytes=settings.max_batch_bytes, timeout_s=settings.body_timeout_s)
    return tensors.read_request(
        body,
        request.headers.get("inference-header-content-length"),
        max_images=settings.max_batch_images,
        max_image_bytes=settings.max_image_bytes,
    )


def _versions(state: AppState, model: str) -> list[str]:
    return sorted({seen.version for _, _, seen in state.router.seen() if seen.model == model})


def _readiness(state: AppState, model: str, version: str | None) -> dict[str, Any]:
    target = state.router.choose("predict", version, model=model)
    return {"name": model, "version": target.version, "ready": True}


def _metadata(state: AppState, name: str, versions: list[str]) -> dict[str, Any]:
    seen = [version for _, _, version in state.router.seen() if version.model == name and version.version in versions]
    contracts = (version.contract for version in seen)
    outputs = tensors.OUTPUTS if any(map(forward_methods, contracts)) else tensors.DEFAULT_OUTPUTS
    return {
        "name": name,
        "versions": versions,
        "platform": "torchserve",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": output, "datatype": tensors.OUTPUTS[output], "shape": [-1]} for output in outputs],
    }
