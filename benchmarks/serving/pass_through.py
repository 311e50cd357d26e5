"""Serve as the smallest possible gateway before TorchServe: only FastAPI and the gateway's own transport.

It has no keys, limits, metrics, ids, logs or errors. The gateway's extra cost is the cost of these.
"""

from __future__ import annotations

import os

import httpx
from fastapi import FastAPI, Request, Response

from gateway.inference.transport import PooledTransport


def create_app() -> FastAPI:
    """Return the application; PASS_TO is TorchServe's address with path, like http://127.0.0.1:9101/predictions/cifar10."""
    url, transport = httpx.URL(os.environ["PASS_TO"]), PooledTransport()
    headers = [(b"content-type", b"application/octet-stream")]
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        upstream = httpx.Request("POST", url, headers=headers, content=await request.body())
        answer = await transport.handle_async_request(upstream)
        return Response(answer.content, answer.status_code, media_type="application/json")

    @app.get("/livez")
    async def livez() -> Response:
        return Response(b"{}", media_type="application/json")

    return app
