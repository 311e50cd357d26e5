"""`/` and `/ops`: the playground and the operations view, which are static files in `gateway/page`.

The files need no build step and load nothing from another host. The browser enforces this: `CONTENT_POLICY` allows
files of this gateway and images that the page made itself, and no inline script or style.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.dependencies import State
from gateway.refusals import RouteUnknown

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).parents[1] / "page"
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": CONTENT_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@router.get("/")
async def playground(request: Request) -> Response:
    """Return the playground. Its links are relative, so that it also works under a proxy's path prefix."""
    return _answer(request, "index.html")


@router.get("/ops")
async def operations(request: Request) -> Response:
    """Return the operations view. Its data come from /metrics and /models, which need the scope `read`."""
    return _answer(request, "ops.html")


@router.get("/page/config.json")
async def config(state: State) -> dict[str, Any]:
    """Return what the page must know before the first call: limits, and what this gateway offers."""
    settings = state.settings
    return {
        "asks_for_keys": settings.asks_for_keys,
        "takes_feedback": state.recorder is not None,
        "max_image_bytes": settings.max_image_bytes,
        "max_batch_bytes": settings.max_batch_bytes,
        "max_batch_images": settings.max_batch_images,
    }


@router.get("/page/{name:path}")
async def file(request: Request, name: str) -> Response:
    """Return a file of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    """Return a file from memory, or 304 if the browser has it.

    Raises:
        RouteUnknown: the page has no such file.
    """
    found = _files().get(name)
    if found is None:
        raise RouteUnknown
    content, etag = found
    headers = {**HEADERS, "etag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=MEDIA_TYPES[Path(name).suffix], headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Return each file's content and entity tag, by its path below `FOLDER`."""
    files = {}
    for path in FOLDER.rglob("*.*"):
        content = path.read_bytes()
        files[path.relative_to(FOLDER).as_posix()] = (content, f'"{sha256(content).hexdigest()[:16]}"')
    return files
