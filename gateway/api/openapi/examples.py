"""Examples of every answer for the OpenAPI document; a test checks each against its schema."""

from __future__ import annotations

from typing import Any

REQUEST_ID = "0f4c0e8a6f8d4b0c8d9e5c1f0a2b3c4d"
MODEL = {"name": "cifar10", "version": "1.0.0"}
TOP = [{"class": "cat", "confidence": 0.94}, {"class": "dog", "confidence": 0.04}]

PREDICTION: dict[str, Any] = {
    "class": "cat",
    "confidence": 0.94,
    "top": TOP,
    "model": MODEL,
    "request_id": REQUEST_ID,
}
BATCH: dict[str, Any] = {
    "results": [
        {"class": "cat", "confidence": 0.94, "top": TOP},
        {"error": {"status": 422, "code": "image_unreadable", "detail": "the image ends before it is whole"}},
    ],
    "model": MODEL,
    "request_id": REQUEST_ID,
}
EXPLANATION: dict[str, Any] = {
    "class": "cat",
    "confidence": 0.94,
    "target": "cat",
    "method": "gradcam",
    "layer": "layer3",
    "heatmap": [[0.0, 0.25], [0.5, 1.0]],
    "model": MODEL,
    "request_id": REQUEST_ID,
}
FEEDBACK: dict[str, Any] = {"request_id": REQUEST_ID, "class": "dog", "note": "a puppy"}
FEEDBACK_KEPT: dict[str, Any] = {"request_id": REQUEST_ID, "class": "dog"}
VERSION: dict[str, Any] = {
    "model": "cifar10",
    "version": "1.0.0",
    "role": "stable",
    "state": "ready",
    "routable": True,
    "workers": {
        "predict": {"ready": 2, "wanted": 2, "fallback": 0, "pending": 0},
        "explain": {"ready": 1, "wanted": 1, "fallback": 0, "pending": 0},
    },
}
HEALTH: dict[str, Any] = {
    "status": "ok",
    "model": "cifar10",
    "plan_revision": 3,
    "replicas": {"known": 1, "seen": 1},
    "versions": [VERSION],
    "reasons": [],
}
MODELS: dict[str, Any] = {
    "name": "cifar10",
    "versions": [
        {**VERSION, "contract": {"schema": 1, "name": "cifar10", "version": "1.0.0", "classes": ["cat", "dog"]}}
    ],
}
INFER: dict[str, Any] = {
    "id": "1",
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["<a PNG file in base64>"]}],
    "parameters": {"top_k": 1},
}
INFERRED: dict[str, Any] = {
    "id": "1",
    "model_name": "cifar10",
    "model_version": "1.0.0",
    "outputs": [
        {"name": "class", "datatype": "BYTES", "shape": [1], "data": ["cat"]},
        {"name": "confidence", "datatype": "FP32", "shape": [1], "data": [0.94]},
    ],
}
