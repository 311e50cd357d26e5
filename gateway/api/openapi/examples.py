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
    "familiar": True,
    "model": MODEL,
    "request_id": REQUEST_ID,
}
BATCH: dict[str, Any] = {
    "results": [
        {"class": "cat", "confidence": 0.94, "top": TOP, "familiar": True},
        {"error": {"status": 422, "code": "image_unreadable", "detail": "the image ends before it is whole"}},
    ],
    "model": MODEL,
    "request_id": REQUEST_ID,
}
EVIDENCE: dict[str, Any] = {
    "class": "cat",
    "confidence": 0.94,
    "target": {"class": "cat", "confidence": 0.94},
    "method": "contrastcam",
    "heatmap": [[0.0, 0.251], [0.502, 1.0]],
    "strength": 3.2,
    "familiar": True,
    "familiarity": 0.83,
    "similar": [
        {"id": 17, "class": "cat", "similarity": 0.91, "image": "/models/cifar10/versions/1.0.0/examples/17.png"},
        {"id": 204, "class": "dog", "similarity": 0.62, "image": "/models/cifar10/versions/1.0.0/examples/204.png"},
    ],
    "classes": TOP,
    "test": {
        "kept": 0.9,
        "removed": 0.12,
        "verdict": "The hot region alone is enough for this class, and without it the class is lost.",
    },
}
EXPLANATION: dict[str, Any] = {**EVIDENCE, "model": MODEL, "request_id": REQUEST_ID}
EXPLAINED_BATCH: dict[str, Any] = {"results": [EVIDENCE, BATCH["results"][1]], "model": MODEL, "request_id": REQUEST_ID}
FEEDBACK: dict[str, Any] = {"request_id": REQUEST_ID, "class": "dog", "note": "a puppy"}
FEEDBACK_KEPT: dict[str, Any] = {"request_id": REQUEST_ID, "class": "dog"}
VERSION: dict[str, Any] = {
    "model": "cifar10",
    "version": "1.0.0",
    "role": "stable",
    "share": 100.0,
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
