"""A backend without TorchServe: 40 lines of the standard library and `contracts/` answer a gateway."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import httpx

from contracts import plan, status, wire
from contracts.model import Contract, Explanation, Input
from gateway.app import create_app
from gateway.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = Contract(
    "bright", "1.0.0", ("dark", "light"), Input(1, 1, (0.0,) * 3, (1.0,) * 3), "mean", Explanation(), schema=3
)


class BrightBackend(BaseHTTPRequestHandler):
    """Answers `light` if the image's bytes are large on average, and is its own agent."""

    def do_GET(self) -> None:
        """Report one version, ready."""
        server = status.ServerStatus("running", 0, f"http://127.0.0.1:{self.server.server_port}")
        pool = status.Pool(ready=1, wanted=1)
        version = status.VersionStatus(
            "bright", "1.0.0", "stable", "ready", routable=True, predict=pool, explain=pool, contract=CONTRACT
        )
        now = time.time()
        found = status.AgentStatus(now, draining=False, torchserve=server, versions=(version,), told_at=now)
        self.reply(json.dumps(status.dump(found)).encode())

    def do_POST(self) -> None:
        """Answer one upstream batch."""
        body = self.rfile.read(int(self.headers["content-length"]))
        images = wire.parse_body(self.headers["content-type"], body)
        self.reply(wire.dump_results([self.predict(image) for image in images]))

    def predict(self, image: wire.Bytes) -> wire.Entry:
        light = sum(image) / len(image) / 255
        return wire.dump_prediction(sorted({"dark": 1 - light, "light": light}.items(), key=lambda found: -found[1]))

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Be silent."""


def test_a_gateway_predicts_by_any_server_that_speaks_the_documents(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BrightBackend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    release = plan.Release("1.0.0", "bright-1.0.0.mar", "0" * 64)
    plans = plan.Plans(1, "bright", (plan.Plan(1, "bright", release),))
    (tmp_path / "plan.json").write_text(json.dumps(plan.dump(plans)), encoding="utf-8")
    app = create_app(Settings(plan=tmp_path / "plan.json", agents=(f"http://127.0.0.1:{server.server_port}",)))

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://g") as c:
            return await c.post("/predict", content=b"\xff\xf0\xfe")

    answer = asyncio.run(call()).json()
    server.shutdown()
    server.server_close()
    assert (answer["class"], answer["model"]) == ("light", {"name": "bright", "version": "1.0.0"})
