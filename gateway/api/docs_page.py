"""`/docs`: Swagger UI over the OpenAPI document, all of it served from here, so that it works without a network.

FastAPI's own page loads Swagger UI from a CDN. The same files come with the package fastapi-offline, of which nothing
else is used.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, Response

from gateway.api import openapi
from gateway.state import state_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.settings import Settings

ASSETS = Path(str(files("fastapi_offline"))) / "static"
NO_ICON = "data:,"


async def document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(_document(state_of(request).settings), media_type="application/json")


@lru_cache(maxsize=1)
def _document(settings: Settings) -> bytes:
    """Return the document's bytes, made once: that takes 14 ms, in which nobody else is answered."""
    return orjson.dumps(openapi.document(settings))


async def page(request: Request) -> Response:  # noqa: ARG001 — a route's signature
    """The page. Its addresses are relative, so that it works below a proxy's prefix too."""
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
            # Swagger UI would send the document's address to validator.swagger.io.
            swagger_ui_parameters={"validatorUrl": "none"},
        ).body
    )


async def script(request: Request) -> Response:  # noqa: ARG001 — a route's signature
    """Swagger UI's program."""
    return FileResponse(ASSETS / "swagger-ui-bundle.js", media_type="text/javascript")


async def style(request: Request) -> Response:  # noqa: ARG001 — a route's signature
    """Swagger UI's looks."""
    return FileResponse(ASSETS / "swagger-ui.css", media_type="text/css")
