"""The answers of the image routes to good calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts import wire
from gateway.api.explanations import overlay_headers

if TYPE_CHECKING:
    from conftest import Stand

IMAGE = b"image-of-dog"


@pytest.mark.parametrize(
    "body",
    [
        {"content": IMAGE},
        {"content": IMAGE, "headers": {"content-type": "application/octet-stream"}},
        {"content": IMAGE, "headers": {"content-type": "image/webp"}},
        {"files": {"file": ("dog.png", IMAGE, "image/png")}},
        {"files": {"file": ("../../etc/passwd", IMAGE)}},
    ],
)
def test_an_image_is_answered_however_it_is_sent(stand: Stand, body: dict[str, Any]) -> None:
    answer = stand.client.post("/predict?top_k=2", **body)
    assert answer.status_code == 200
    assert answer.json() == {
        "class": "dog",
        "confidence": 0.9,
        "top": [{"class": "dog", "confidence": 0.9}, {"class": "frog", "confidence": 0.1}],
        "model": {"name": "cifar10", "version": "1.0.0"},
        "request_id": answer.headers["x-request-id"],
    }


def test_torchserve_gets_the_bytes_one_header_and_the_explicit_version(stand: Stand) -> None:
    stand.client.post("/predict", files={"file": ("dog.png", IMAGE)}, headers={"x-request-id": "abc-1"})
    call = stand.torchserve.calls[0]
    assert call.url.path == "/predictions/cifar10/1.0.0"
    assert call.content == IMAGE
    assert set(call.headers) == {"host", "content-length", "content-type", "x-gradserve"}
    options = wire.parse_options(call.headers["x-gradserve"])
    assert options.deadline is not None
    assert options.deadline > 1.7e12
    assert options == wire.Options("abc-1", options.deadline, top_k=1)


def test_a_batch_is_answered_in_order_and_a_bad_image_fails_alone(stand: Stand) -> None:
    images = [b"image-of-dog", b"bad:image_unreadable", b"image-of-frog"]
    answer = stand.client.post("/predict/batch", files=[("file", ("x", image)) for image in images])
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [entry.get("class") for entry in results] == ["dog", None, "frog"]
    assert results[1]["error"] == {
        "status": 422,
        "code": "image_unreadable",
        "detail": "the handler's sentence",
        "limit": 7,
    }


def test_an_explanation_is_an_image(stand: Stand) -> None:
    answer = stand.client.post("/explain?target=frog&method=eigencam&alpha=0.25&size=64", content=IMAGE)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    call = stand.torchserve.calls[0]
    assert call.url.path == "/explanations/cifar10-explain/1.0.0"
    options = wire.parse_options(call.headers["x-gradserve"])
    assert (options.target, options.method, options.alpha, options.size) == ("frog", "eigencam", 0.25, 64)
    assert options.format == "png"


def test_the_headers_of_an_overlay_name_what_it_explains(stand: Stand) -> None:
    headers = stand.client.post("/explain?target=frog", content=IMAGE).headers
    told = {name: headers[name] for name in ("x-class", "x-confidence", "x-target", "x-method", "x-model-version")}
    assert list(told.values()) == ["cat", "0.9", "frog", "gradcam", "1.0.0"]


def test_a_class_name_that_is_not_printable_ascii_is_percent_encoded() -> None:
    about = {"class": "Türkis 100 %", "confidence": 0.5, "target": "a\r\nb: c", "method": "gradcam"}
    assert overlay_headers(about) == {
        "x-class": "T%C3%BCrkis 100 %25",
        "x-confidence": "0.5",
        "x-target": "a%0D%0Ab: c",
        "x-method": "gradcam",
    }


@pytest.mark.parametrize("about", [b"", b"gradserve\0{", b"gradserve\0[1]", b"other\0{}"])
def test_an_overlay_without_facts_has_no_headers_about_its_class(stand: Stand, about: bytes) -> None:
    chunk = len(about).to_bytes(4, "big") + b"tEXt" + about
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + bytes(17) + chunk
    stand.torchserve.answer = lambda _request: httpx.Response(200, content=png)
    answer = stand.client.post("/explain", content=IMAGE)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "1.0.0")
    assert "x-class" not in answer.headers


def test_an_explanation_comes_as_numbers_when_asked(stand: Stand) -> None:
    answer = stand.client.post("/explain", content=IMAGE, headers={"accept": "application/json"})
    assert answer.json()["heatmap"] == [[0.0, 1.0]]
    assert answer.json()["model"] == {"name": "cifar10", "version": "1.0.0"}
