"""`/docs`: Swagger UI for the OpenAPI document, served by the gateway itself, so that it works without a network.

FastAPI's own page loads Swagger UI from a CDN. The same files come with the package fastapi-offline; only these files
of it are used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import orjson
from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

router = APIRouter(include_in_schema=False)
ASSETS = Path(str(files("fastapi_offline"))) / "static"
NO_ICON = "data:,"
SLICE_BYTES = 64 * 1024


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(_document(request.app), media_type="application/json")


@lru_cache(maxsize=1)
def _document(app: FastAPI) -> bytes:
    """Return the document's bytes, made once: making them blocks the event loop for 14 ms."""
    return orjson.dumps(app.openapi())


@router.get("/docs")
async def page() -> Response:
    """Return the page. Its links are relative, so that it also works under a proxy's path prefix."""
    return HTMLResponse(_page())


@lru_cache(maxsize=1)
def _page() -> bytes:
    return bytes(
        get_swagger_ui_html(
            openapi_url="openapi.json",
            title="gradserve",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url=NO_ICON,
            # Otherwise Swagger UI sends the document's address to validator.swagger.io.
            swagger_ui_parameters={"validatorUrl": "none"},
        ).body
    )


@router.get("/docs/swagger-ui-bundle.js")
async def script(request: Request) -> Response:
    """Return Swagger UI's script."""
    return _asset(request, "swagger-ui-bundle.js", "text/javascript")


@router.get("/docs/swagger-ui.css")
async def style(request: Request) -> Response:
    """Return Swagger UI's style sheet."""
    return _asset(request, "swagger-ui.css", "text/css")


def _asset(request: Request, name: str, media_type: str) -> Response:
    """Return a file from memory; Starlette's FileResponse would use a thread for each 64 KiB."""
    content, etag = _read(name)
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"etag": etag})
    headers = {"content-length": str(len(content)), "etag": etag}
    return StreamingResponse(_slices(content), media_type=media_type, headers=headers)


@lru_cache(maxsize=2)
def _read(name: str) -> tuple[bytes, str]:
    """Return a file's content and its entity tag."""
    content = (ASSETS / name).read_bytes()
    return content, f'"{sha256(content).hexdigest()[:16]}"'


async def _slices(content: bytes) -> AsyncIterator[memoryview]:
    """Yield the content in slices, so that for a slow caller only one slice is buffered."""
    view = memoryview(content)
    for start in range(0, len(view), SLICE_BYTES):
        yield view[start : start + SLICE_BYTES]
