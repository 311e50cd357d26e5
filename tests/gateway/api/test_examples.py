"""The examples in docs/how-to/call.md work as they are written there, and Triton's own client finds all its routes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "how-to" / "call.md").read_text(encoding="utf-8")
TRITON = """
import sys
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready()
assert client.is_model_ready("cifar10") and client.is_model_ready("cifar10", "1.0.0")
assert not client.is_model_ready("cifar10", "9.9.9")
assert client.get_server_metadata()["name"] == "gradserve"
metadata = client.get_model_metadata("cifar10", "1.0.0")
assert (metadata["name"], metadata["inputs"][0]["datatype"]) == ("cifar10", "BYTES"), metadata

encoded = np.array([b"image-of-cat", b"image-of-dog", b"image-of-frog"], dtype=object)
for binary in (True, False):
    images = triton.InferInput("image", [3], "BYTES")
    images.set_data_from_numpy(encoded)  # an image is no text: it goes binary whatever the answer does
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("class", "confidence")]
    answer = client.infer("cifar10", [images], model_version="1.0.0", outputs=outputs, request_id="abc")
    assert [name.decode() if binary else name for name in answer.as_numpy("class")] == ["cat", "dog", "frog"]
    assert np.allclose(answer.as_numpy("confidence"), 0.9)
    assert answer.get_response()["id"] == "abc"

answer = client.infer("cifar10", [images], parameters={"top_k": 2})
assert answer.as_numpy("class").shape == answer.as_numpy("confidence").shape == (3, 2)

try:
    client.infer("cifar10", [images], model_version="9.9.9")
except triton.InferenceServerException as error:
    assert error.status() == "404", error
else:
    raise AssertionError("an unknown version was answered")
"""


@pytest.fixture(scope="module")
def gateway(start_gateway: Callable[..., tuple[str, int]]) -> str:
    """Return the address of a gateway in a process of its own."""
    return start_gateway(WORKERS="1")[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the images that the examples name."""
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").write_bytes(f"image-of-{name}".encode())
    return tmp_path


def run(code: str, folder: Path, *arguments: str) -> str:
    """Return the output of a program, run in `folder` in a process of its own because tritonclient imports gevent."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def examples(language: str, mark: str) -> list[str]:
    """Return the document's code blocks of a language that contain `mark`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if mark in block]


def test_the_python_client_example_runs(gateway: str, folder: Path) -> None:
    (example,) = examples("python", "from gradserve")
    assert run(example.replace("http://localhost:8000", gateway), folder) == "cat\n"
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_the_triton_client_example_runs(gateway: str, folder: Path) -> None:
    (example,) = examples("python", "tritonclient")
    said = run(example.replace("localhost:8000", gateway.removeprefix("http://")), folder)
    assert said == "[b'cat'] [0.9]\n"


def test_the_curl_examples_run(gateway: str, folder: Path) -> None:
    (block,) = examples("console", "curl")
    lines = re.findall(r"^\$ (curl .*)$", block, re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        command = line.replace("localhost:8000", gateway.removeprefix("http://"))
        done = subprocess.run(
            f"{command} --fail --silent --show-error", shell=True, cwd=folder, capture_output=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_tritons_client_finds_every_route_that_it_calls(gateway: str, folder: Path) -> None:
    run(TRITON, folder, gateway.removeprefix("http://"))
