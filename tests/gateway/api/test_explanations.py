"""The answers of the routes of explanations to good calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx

from contracts import wire
from gateway.api import schemas

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

IMAGE = b"image-of-dog"
JSON = {"accept": "application/json"}
EXAMPLES = "/models/cifar10/versions/1.0.0/examples"


def test_the_default_explanation_is_made_by_the_workers_that_predict(evidence_stand: Stand) -> None:
    document = evidence_stand.explain("?target=frog&similar=1")
    assert document == {
        "class": "dog",
        "confidence": 0.9,
        "target": {"class": "frog", "confidence": 0.25},
        "method": "sharpcam",
        "heatmap": [[0.0, 0.502, 1.0]],
        "strength": 2.5,
        "familiar": True,
        "familiarity": 0.75,
        "similar": [{"id": 0, "class": "frog", "similarity": 0.9, "image": f"{EXAMPLES}/0.png"}],
        "model": {"name": "cifar10", "version": "1.0.0"},
        "request_id": document["request_id"],
    }
    path, options = evidence_stand.torchserve.asked()
    assert path == "/predictions/cifar10/1.0.0"
    assert options.images == (wire.ImageOptions(explain=True, target=2, similar=1),)


def test_without_explain_workers_the_default_method_and_readiness_stay(evidence_stand: Stand) -> None:
    stand = evidence_stand
    stand.agent.versions[0]["explain"] = {"ready": 0, "wanted": 1, "pending": 0, "capacity": 100}
    stand.wait_until(lambda: stand.client.get("/health").json()["status"] == "degraded")
    assert stand.client.get("/readyz").status_code == 200
    assert stand.explain()["method"] == "sharpcam"
    refused = stand.client.post("/explain?method=gradcam", content=IMAGE)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")


def test_an_overlay_comes_from_the_workers_that_predict_and_its_headers_say_what_it_shows(
    evidence_stand: Stand,
) -> None:
    query = "?target=frog&alpha=0.25&size=64&coverage=0.9&test=true"
    answer = evidence_stand.client.post(f"/explain{query}", content=IMAGE)
    assert answer.headers["content-type"] == "image/png"
    told = [answer.headers[f"x-{name}"] for name in ("class", "confidence", "target", "method", "familiar")]
    assert told == ["dog", "0.9", "frog", "sharpcam", "true"]
    path, options = evidence_stand.torchserve.asked()
    assert path == "/predictions/cifar10/1.0.0"
    assert (options.alpha, options.size, options.format) == (0.25, 64, "png")
    assert options.images == (wire.ImageOptions(explain=True, target=2, similar=0),), "an overlay shows nothing else"


def test_predictions_say_whether_the_image_is_familiar(evidence_stand: Stand) -> None:
    files = [("file", ("x", IMAGE))]
    evidence_stand.torchserve.answer = lambda _: httpx.Response(
        200, json={"results": [wire.dump_prediction([("dog", 0.9)], familiar=False)]}
    )
    assert evidence_stand.client.post("/predict", content=IMAGE).json()["familiar"] is False
    batch = evidence_stand.client.post("/predict/batch", files=files).json()
    assert batch["results"][0]["familiar"] is False


def test_predictions_and_explanations_of_several_callers_share_an_upstream_batch(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.05)
        return stand.torchserve(request)

    stand = make_stand(upstream=slow, agent=make_agent([make_version(schema=3)]))
    paths = ["/predict", "/explain?target=cat", "/predict", "/explain?target=frog", "/explain"]
    names = ["cat", "dog", "frog", "dog", "frog"]

    async def scene() -> list[httpx.Response]:
        post = stand.client.http.post
        calls = zip(paths, names, strict=True)
        return await asyncio.gather(
            *(post(path, content=f"image-of-{name}".encode(), headers=JSON) for path, name in calls)
        )

    answers = [answer.json() for answer in stand.client.portal.call(scene)]
    assert [answer["class"] for answer in answers] == names
    assert [answer.get("target", {}).get("class") for answer in answers] == [None, "cat", None, "frog", "frog"]
    assert len(stand.torchserve.calls) == 2, "the first alone, the others together"


def test_many_images_are_explained_in_order_and_a_bad_one_fails_alone(evidence_stand: Stand) -> None:
    images = [b"image-of-dog", b"bad:image_unreadable", b"image-of-frog"]
    answer = evidence_stand.client.post("/explain/batch?similar=0", files=[("file", ("x", image)) for image in images])
    assert answer.status_code == 200, answer.text
    schemas.BatchExplanation.model_validate_json(answer.content)
    results = answer.json()["results"]
    assert [entry.get("class") for entry in results] == ["dog", None, "frog"]
    assert results[0]["target"] == {"class": "dog", "confidence": 0.25}
    assert results[1]["error"]["code"] == "image_unreadable"
    assert {evidence_stand.torchserve.asked()[0]} == {"/predictions/cifar10/1.0.0"}


def test_many_images_are_explained_one_by_one_where_that_needs_a_backward_pass(evidence_stand: Stand) -> None:
    files = [("file", ("x", image)) for image in (b"image-of-dog", b"bad:image_unreadable", b"image-of-frog")]
    results = evidence_stand.client.post("/explain/batch?method=gradcam", files=files).json()["results"]
    assert [entry.get("class") for entry in results] == ["dog", None, "frog"]
    assert [call.url.path for call in evidence_stand.torchserve.calls] == ["/explanations/cifar10-explain/1.0.0"] * 3
