"""The Open Inference Protocol V2 over HTTP, so that Triton's and KServe's clients work unchanged.

The model takes one input `image` (BYTES, shape [n]: whole image files) and gives `class` (BYTES) and `confidence`
(FP32), both of shape [n], or with the request parameter `top_k` above 1 both of shape [n, top_k].
Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from gateway.api import params, v2_tensors
from gateway.api.predictions import ask_of, json_response
from gateway.api.uploads import read_body
from gateway.errors import Unavailable
from gateway.refusals import ModelUnknown, VersionUnknown
from gateway.request_context import context_of
from gateway.settings import VERSION
from gateway.state import AppState, state_of

if TYPE_CHECKING:
    from starlette.requests import Request


async def server(request: Request) -> Response:
    """The server's metadata."""
    await state_of(request).callers.admit(request, "predict")
    return json_response({"name": "gradserve", "version": VERSION, "extensions": ["binary_tensor_data"]})


async def live(request: Request) -> Response:  # noqa: ARG001 — a route's signature
    """The process answers."""
    return json_response({"live": True})


async def ready(request: Request) -> Response:
    """Whether the stable version answers."""
    parts = state_of(request)
    if parts.is_draining:
        raise Unavailable("draining")
    if not parts.versions.is_ready():
        raise Unavailable("not_ready")
    return json_response({"ready": True})


async def model_metadata(request: Request) -> Response:
    """The model's name, versions, input and outputs."""
    parts = state_of(request)
    await parts.callers.admit(request, "predict")
    name = _model(request, parts)
    version = _version(request)
    versions = sorted({seen.version for _, _, seen in parts.versions.seen()})
    if version is not None and version not in versions:
        raise VersionUnknown(version)
    return json_response(
        {
            "name": name,
            "versions": versions if version is None else [version],
            "platform": "torchserve",
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": "class", "datatype": "BYTES", "shape": [-1]},
                {"name": "confidence", "datatype": "FP32", "shape": [-1]},
            ],
        }
    )


async def model_ready(request: Request) -> Response:
    """Whether the model, or the version in the path, answers."""
    parts = state_of(request)
    await parts.callers.admit(request, "predict")
    name = _model(request, parts)
    target = parts.versions.choose("predict", _version(request))
    return json_response({"name": name, "version": target.version, "ready": True})


async def infer(request: Request) -> Response:
    """The classes of the images in the input tensor; one image without an answer fails the call."""
    parts, context = state_of(request), context_of(request.scope)
    await parts.callers.admit(request, "predict")
    name = _model(request, parts)
    ask = ask_of(request, parts, _version(request))
    asked = await _read(request, parts)
    entries = await parts.service.predict_batch(asked.images, top_k=asked.top_k, ask=ask)
    v2_tensors.raise_for_failed(entries)
    context.entries = entries
    head: dict[str, Any] = {"model_name": name, "model_version": context.version}
    if asked.id:
        head["id"] = asked.id
    content, header_length = v2_tensors.write_response(head, entries, asked)
    if header_length is None:
        response = Response(content, media_type="application/json")
    else:
        response = Response(
            content,
            media_type="application/octet-stream",
            headers={"inference-header-content-length": str(header_length)},
        )
    parts.shadow.follow(response, asked.images, entries, context)
    return response


async def _read(request: Request, parts: AppState) -> v2_tensors.InferRequest:
    """What is asked; the body is let go, because the images are copies of its parts."""
    settings = parts.settings
    with context_of(request.scope).stage("body"):
        body = await read_body(request, max_bytes=settings.max_batch_bytes, timeout_s=settings.body_timeout_s)
    return v2_tensors.read_request(
        body,
        request.headers.get("inference-header-content-length"),
        max_images=settings.max_batch_images,
        max_image_bytes=settings.max_image_bytes,
    )


def _model(request: Request, parts: AppState) -> str:
    name = str(request.path_params["model"])
    if parts.versions.plan is None:
        raise Unavailable("not_ready")
    if name != parts.versions.plan.model:
        raise ModelUnknown(name)
    return name


def _version(request: Request) -> str | None:
    version = request.path_params.get("version")
    return None if version is None else params.check_version(version)
