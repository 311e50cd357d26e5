"""Both clients send the same requests and read the same answers."""

from __future__ import annotations

import json

import httpx
import pytest

from gradserve import Client, ModelVersion, Similar

PNG = b"\x89PNG fake image"
CAT = {
    "class": "cat",
    "confidence": 0.9,
    "top": [{"class": "cat", "confidence": 0.9}],
    "model": {"name": "cifar10", "version": "1.0.0"},
    "request_id": "r1",
}


def test_prediction_is_typed_and_still_reads_like_the_document(asking) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, str(request.url), request.content))
        return httpx.Response(200, json=CAT)

    answer = asking(gateway)("predict", b"image", top_k=3, version="1.0.0")
    assert seen == [("POST", "http://gateway/predict?top_k=3&version=1.0.0", b"image")]
    assert (answer.class_name, answer.confidence, answer.familiar) == ("cat", 0.9, None)
    assert answer["class"] == "cat"
    assert answer.model == ModelVersion("cifar10", "1.0.0")
    assert "familiar" not in answer
    assert hash(answer) == hash(answer)


def test_explain_returns_the_png(asking) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, dict(request.url.params), request.headers["accept"]))
        return httpx.Response(200, content=PNG)

    assert asking(gateway)("explain", b"x", target="frog", alpha=0.3, size=64) == PNG
    assert seen == [("/explain", {"target": "frog", "alpha": "0.3", "size": "64"}, "image/png")]


def test_example_reads_the_thumbnail_that_the_evidence_names(asking) -> None:
    similar = Similar(7, "cat", 0.9, "/models/cifar10/versions/1.0.0/examples/7.png")

    def gateway(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=PNG) if request.url.path == similar.url else httpx.Response(404)

    assert asking(gateway)("example", similar) == PNG
    with pytest.raises(ValueError, match="pack it again"):
        asking(gateway)("example", Similar(7, "cat", 0.9, ""))


def test_feedback_names_the_call_and_the_right_class(asking) -> None:
    seen = []

    def gateway(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(204)

    ask = asking(gateway)
    ask("feedback", "r1", "dog")
    ask("feedback", "r1", "dog", note="a puppy")
    assert seen == [
        ("/feedback", {"request_id": "r1", "class": "dog"}),
        ("/feedback", {"request_id": "r1", "class": "dog", "note": "a puppy"}),
    ]


def test_health_is_read_from_a_503_too_and_asked_once(asking) -> None:
    calls = []

    def gateway(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(503, json={"status": "unavailable"}, headers={"retry-after": "1"})

    assert asking(gateway)("health") == {"status": "unavailable"}
    assert len(calls) == 1


def test_the_key_is_sent(asking) -> None:
    seen: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={})

    asking(note, key="secret")("models")
    assert seen == ["Bearer secret"]


def test_the_former_method_heatmap_answers_and_names_the_new_one(document) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=document()))
    with pytest.warns(DeprecationWarning, match="Client.evidence"):
        answer = Client("http://g", transport=transport).heatmap(b"x")
    assert answer.method == "contrastcam"
