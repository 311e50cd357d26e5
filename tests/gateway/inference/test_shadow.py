"""Copies of calls to a shadow: their content, time and number; callers do not notice them."""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.inference.shadow import MOST_MIRRORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

SHADOW = {"version": "2.0.0", "archive": "cifar10-2.0.0.mar", "sha256": "2" * 64, "workers": None}
CANARY = {"version": "1.1.0", "archive": "cifar10-1.1.0.mar", "sha256": "1" * 64, "workers": None, "share": 100}


@pytest.fixture
def shadowed(
    make_stand: Callable[..., Stand],
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    make_plan: Callable[..., dict[str, Any]],
) -> Callable[..., Stand]:
    """Return `shadowed(canary=…, any setting=…)`, which starts a gateway whose plan has the shadow 2.0.0."""

    def make(*, canary: dict[str, Any] | None = None, **settings: Any) -> Stand:
        versions = [make_version(), make_version("1.1.0", "canary"), make_version("2.0.0", "shadow")]
        plan = make_plan(canary=canary, shadow=SHADOW)
        return make_stand(agent=make_agent(versions=versions), plan=plan, **settings)

    return make


def to_shadow(request: httpx.Request) -> bool:
    return request.url.path.endswith("/2.0.0")


def shadow_says(name: str, *top: tuple[str, float]) -> Callable[[httpx.Request], httpx.Response | None]:
    """Return an `answer` that gives the shadow's calls this prediction; other calls get the fake's own answers."""

    def answer(request: httpx.Request) -> httpx.Response | None:
        if not to_shadow(request):
            return None
        classes = [{"class": label, "confidence": confidence} for label, confidence in top]
        return httpx.Response(200, json={"results": [{"class": name, "confidence": top[0][1], "top": classes}]})

    return answer


def counted(stand: Stand) -> dict[str, float]:
    """Return the shadow's metrics by the one label that varies."""
    lines = stand.client.get("/metrics").text.splitlines()
    return {
        re.findall(r'(?:outcome|direction)="(\w+)"', line)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(("gateway_shadow_images_total{", "gateway_shadow_shift_total{"))
        and 'version="2.0.0"' in line
    }


def test_answers_are_compared_by_class_and_by_the_confidence_of_the_answered_class(
    shadowed: Callable[..., Stand],
) -> None:
    stand = shadowed()
    stand.torchserve.answer = shadow_says("cat", ("cat", 0.95), ("dog", 0.05))
    stand.client.post("/predict", content=b"image-of-cat")
    stand.wait_until(lambda: counted(stand) == {"agree": 1, "up": pytest.approx(0.05)})
    stand.torchserve.answer = shadow_says("dog", ("dog", 0.6), ("cat", 0.3))
    stand.client.post("/predict", content=b"image-of-cat")
    stand.wait_until(lambda: counted(stand).get("disagree") == 1)
    assert counted(stand)["down"] == pytest.approx(0.6), "0.9 for cat became 0.3, whatever dog has"
    stand.torchserve.answer = shadow_says("boat", ("boat", 1.0))
    stand.client.post("/predict", content=b"image-of-cat")
    stand.wait_until(lambda: counted(stand).get("disagree") == 2)
    assert counted(stand)["down"] == pytest.approx(1.5), "a class that the shadow does not know has nothing of it"


def test_the_mirror_is_sent_after_the_answer(shadowed: Callable[..., Stand]) -> None:
    sent: list[str] = []
    sent_before_the_mirror: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        if to_shadow(request):
            sent_before_the_mirror.extend(sent)
        return stand.torchserve(request)

    stand = shadowed(upstream=note)

    async def call() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"image-of-cat", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message["type"])

        scope = {"type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b""}
        scope |= {"headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http"}
        await stand.app({**scope, "root_path": "", "http_version": "1.1"}, receive, send)

    stand.client.portal.call(call)
    stand.wait_until(lambda: counted(stand).get("agree") == 1)
    assert sent_before_the_mirror == ["http.response.start", "http.response.body"]


def test_a_shadow_that_hangs_does_not_delay_callers_and_gets_at_most_its_places(
    shadowed: Callable[..., Stand],
) -> None:
    finish = asyncio.Event()

    async def hang(request: httpx.Request) -> httpx.Response:
        if to_shadow(request):
            await finish.wait()
        return stand.torchserve(request)

    stand = shadowed(upstream=hang, timeout_s=60)
    for _ in range(MOST_MIRRORS + 3):
        answer = stand.client.post("/predict", content=b"image-of-cat")
        assert (answer.status_code, answer.json()["model"]["version"]) == (200, "1.0.0")
    assert counted(stand) == {"dropped": 3}
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {"cifar10/2.0.0": MOST_MIRRORS})
    stand.client.portal.call(finish.set)
    stand.wait_until(lambda: counted(stand).get("agree") == MOST_MIRRORS)
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {})


def test_copies_in_flight_are_cancelled_at_the_stop(shadowed: Callable[..., Stand]) -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        if to_shadow(request):
            await asyncio.sleep(60)
        return stand.torchserve(request)

    stand = shadowed(upstream=hang, timeout_s=60)
    stand.client.post("/predict", content=b"image-of-cat")
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {"cifar10/2.0.0": 1})
    stand.client.portal.call(stand.app.state.gateway.shadow.close)
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {})
    assert counted(stand) == {}, "nobody's failure"


def test_under_load_nothing_is_mirrored(shadowed: Callable[..., Stand]) -> None:
    finish = asyncio.Event()

    async def slow_dogs(request: httpx.Request) -> httpx.Response:
        if b"dog" in request.content:
            await finish.wait()
        return stand.torchserve(request)

    stand = shadowed(upstream=slow_dogs, in_flight_predict=4)
    post = partial(stand.client.http.post, "/predict?version=2.0.0", content=b"image-of-dog")
    dogs = [stand.client.portal.start_task_soon(post) for _ in range(2)]
    stand.wait_until(lambda: stand.agent.heard["in_flight"] == {"cifar10/2.0.0": 2})
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200
    assert counted(stand) == {"dropped": 1}, "two of four places are taken"
    stand.client.portal.call(finish.set)
    assert [dog.result(20).status_code for dog in dogs] == [200, 200]
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200
    stand.wait_until(lambda: counted(stand).get("agree") == 1)


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ReadError("gone"),
        httpx.Response(503, json={"type": "InternalServerException"}),
        httpx.Response(200, content=b"nonsense"),
        httpx.Response(200, json={"results": [{"error": {"code": "image_unreadable", "detail": "no"}}]}),
        httpx.Response(200, json={"results": [{"class": "cat", "confidence": 1.0}]}),
        httpx.Response(200, json={"results": [{"class": [], "confidence": None, "top": 7}]}),
    ],
)
def test_a_shadows_failure_is_only_counted(
    shadowed: Callable[..., Stand], failure: httpx.Response | httpx.ReadError
) -> None:
    def fail(request: httpx.Request) -> httpx.Response | None:
        if not to_shadow(request):
            return None
        if isinstance(failure, httpx.ReadError):
            raise failure
        return failure

    stand = shadowed()
    stand.torchserve.answer = fail
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200
    stand.wait_until(lambda: counted(stand) == {"failed": 1})
    text = stand.client.get("/metrics").text
    assert "gateway_refused_total{" not in text
    assert 'gateway_requests_total{method="POST",route="/predict",status="200"} 1.0' in text


def test_a_shadow_that_is_not_loaded_counts_as_failed(shadowed: Callable[..., Stand]) -> None:
    stand = shadowed()
    del stand.agent.versions[2]
    stand.wait_until(lambda: len(stand.client.get("/models").json()["versions"]) == 2)
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200
    stand.wait_until(lambda: counted(stand) == {"failed": 1})


def test_a_copy_counts_neither_as_request_nor_as_prediction(shadowed: Callable[..., Stand]) -> None:
    stand = shadowed()
    stand.client.post("/predict", content=b"image-of-cat")
    stand.wait_until(lambda: counted(stand).get("agree") == 1)
    own = [
        line
        for line in stand.client.get("/metrics").text.splitlines()
        if "2.0.0" in line and not line.startswith(("gateway_shadow_", "gateway_workers_", "gateway_queue_"))
    ]
    assert own == []


def test_the_answered_images_of_a_batchs_first_upstream_batch_are_mirrored_together(
    shadowed: Callable[..., Stand],
) -> None:
    stand = shadowed(chunk_images=4)
    images = [b"image-of-cat", b"bad:image_unreadable", *[b"image-of-dog"] * 8]
    stand.client.post("/predict/batch", files=[("file", ("x", image)) for image in images])
    stand.wait_until(lambda: counted(stand).get("agree") == 3)
    (mirror,) = [call for call in stand.torchserve.calls if to_shadow(call)]
    assert mirror.content.count(b"image-of-") == 3


def test_v2_calls_are_mirrored(shadowed: Callable[..., Stand]) -> None:
    stand = shadowed()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aW1hZ2Utb2YtZG9n"]}
    content = json.dumps({"inputs": [tensor]}).encode()
    assert stand.client.post("/v2/models/cifar10/infer", content=content).status_code == 200
    stand.wait_until(lambda: counted(stand).get("agree") == 1)


def test_only_predictions_that_the_stable_version_answered_are_mirrored(shadowed: Callable[..., Stand]) -> None:
    stand = shadowed(canary=CANARY)
    assert stand.client.post("/predict", content=b"x").json()["model"]["version"] == "1.1.0"
    assert stand.client.post("/predict?version=2.0.0", content=b"x").json()["model"]["version"] == "2.0.0"
    assert stand.client.post("/explain?version=1.0.0", content=b"x").status_code == 200
    assert stand.client.post("/predict?version=1.0.0", content=b"bad:image_unreadable").status_code == 422
    assert stand.client.post("/predict?version=1.0.0", content=b"image-of-cat").status_code == 200
    stand.wait_until(lambda: counted(stand).get("agree") == 1)
    assert sum(to_shadow(call) for call in stand.torchserve.calls) == 2, "the one that asked for it, and one mirror"
