"""The examples of docs/reference/client.md run, against a server that answers as the gateway does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "reference" / "client.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"(?ms)^```python\n(.*?)^```", DOCS)


@pytest.fixture
def gateway(document: Callable[..., dict]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body, kind = json.dumps({**document(), "top": document()["classes"]}).encode(), "application/json"
            if self.headers["accept"] == "image/png":
                body, kind = b"\x89PNG", "image/png"
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_example_runs(gateway: str, tmp_path: Path) -> None:
    assert len(EXAMPLES) == 3
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").write_bytes(b"image")
    said = [
        subprocess.run(
            [sys.executable, "-c", example.replace("http://localhost:8000", gateway)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for example in EXAMPLES
    ]
    assert said[0] == "cat 0.9 ['cat', 'dog']\n"
    assert "cat dog contrastcam\n(2, 3)" in said[1]
    assert said[2] == "['cat', 'cat']\n"
    assert (tmp_path / "heatmap.png").exists()
    assert (tmp_path / "heat.png").exists()
