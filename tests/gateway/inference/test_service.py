"""Upstream batches and places: the workers stay busy, and a call whose caller disconnected keeps its place."""

from __future__ import annotations

import asyncio
import io
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from contracts.wire import MAX_REQUEST_BYTES
from gateway.inference.image_header import LARGE_PIXELS
from gateway.inference.service import split_images

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import Stand

IMAGE = b"image-of-dog"
IMAGE_ROUTES = ["/predict", "/explain"]
FILE_ROUTES = [*IMAGE_ROUTES, "/predict/batch"]
INFER = "/v2/models/cifar10/infer"


def test_upstream_batches_hold_all_images_in_order_and_at_most_the_limit() -> None:
    batches = list(split_images([b"x"] * 10, [1] * 10, 4))
    assert batches == [(0, 4), (4, 8), (8, 10)]


def test_upstream_batches_stay_below_torchserves_body_limit_and_a_large_file_is_sent_alone() -> None:
    large = b"x" * (MAX_REQUEST_BYTES // 2)
    assert list(split_images([b"x", large, large, b"x"], [1] * 4, 16)) == [(0, 2), (2, 4)]
    assert list(split_images([b"x" * (MAX_REQUEST_BYTES - 4)] * 2, [1] * 2, 16)) == [(0, 1), (1, 2)]


def test_upstream_batches_have_bounded_pixels_and_a_larger_image_is_sent_alone() -> None:
    half = LARGE_PIXELS // 2
    pixels = [half, half, 1, 5 * LARGE_PIXELS, 1, 1]
    assert list(split_images([b"x"] * 6, pixels, 16)) == [(0, 2), (2, 3), (3, 4), (4, 6)]


def names(answer: httpx.Response) -> list[str | None]:
    return [entry.get("class") for entry in answer.json()["results"]]


def post_batch(stand: Stand, images: list[bytes]) -> httpx.Response:
    return stand.client.post("/predict/batch", files=[("file", ("x", image)) for image in images])


def test_a_batch_is_split_so_that_every_worker_has_work(stand: Stand) -> None:
    images = [f"image-of-{('cat', 'dog', 'frog')[index % 3]}".encode() for index in range(20)]
    answer = post_batch(stand, images)
    assert names(answer) == [("cat", "dog", "frog")[index % 3] for index in range(20)]
    sizes = sorted(call.content.count(b"image-of-") for call in stand.torchserve.calls)
    assert sizes == [10, 10], "two workers, twenty images"


def test_a_batch_is_split_by_the_workers_that_other_calls_leave_free(stand: Stand) -> None:
    def sizes_of_batches() -> list[int]:
        stand.torchserve.calls.clear()
        post_batch(stand, [b"image-of-cat"] * 20)
        return sorted(call.content.count(b"image-of-") for call in stand.torchserve.calls)

    places = stand.app.state.gateway.admission.of("cifar10").predict
    assert sizes_of_batches() == [10, 10]
    assert places.taken == 0, "what the batch took is given back"
    stand.client.portal.call(places.take, "other")
    assert sizes_of_batches() == [20]
    places.give_back(1, "other")
    assert sizes_of_batches() == [10, 10]


def webp(height: int) -> bytes:
    """Return an image of 16,383 x `height` pixels in about 40 bytes."""
    file = io.BytesIO()
    Image.new("RGB", (16_383, height)).save(file, "WEBP", lossless=True, method=0)
    return file.getvalue()


TOO_LARGE, AT_THE_BOUND = webp(3_050), webp(1_525)


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_an_image_of_too_many_pixels_is_refused_before_anything_is_queued_for_it(stand: Stand, path: str) -> None:
    answer = stand.client.post(path, content=TOO_LARGE)
    assert (answer.status_code, answer.json()["code"]) == (413, "image_too_large")
    assert (answer.json()["pixels"], answer.json()["limit"]) == (49_968_150, 25_000_000)
    assert not stand.torchserve.calls


def test_an_image_of_too_many_pixels_fails_alone_in_a_batch(stand: Stand) -> None:
    answer = post_batch(stand, [b"image-of-cat", TOO_LARGE, b"image-of-dog", TOO_LARGE])
    assert names(answer) == ["cat", None, "dog", None]
    assert [entry["error"]["code"] for entry in answer.json()["results"][1::2]] == ["image_too_large"] * 2
    assert not any(TOO_LARGE in call.content for call in stand.torchserve.calls)
    only = post_batch(stand, [TOO_LARGE])
    assert (only.status_code, only.json()["results"][0]["error"]["status"]) == (200, 413)


def test_a_large_image_is_sent_in_an_upstream_batch_of_its_own(stand: Stand) -> None:
    post_batch(stand, [b"image-of-cat"] * 3 + [AT_THE_BOUND] + [b"image-of-cat"] * 3)
    assert [call.content for call in stand.torchserve.calls].count(AT_THE_BOUND) == 1
    assert stand.client.post("/predict", content=AT_THE_BOUND).status_code == 200


def test_pixels_of_a_call_and_of_a_callers_calls_together_are_bounded(make_stand: Callable[..., Stand]) -> None:
    async def upstream(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.05)
        return stand.torchserve(request)

    stand = make_stand(upstream=upstream, max_caller_pixels=30_000_000)
    together = post_batch(stand, [AT_THE_BOUND] * 2)
    assert (together.status_code, together.json()["code"]) == (413, "too_many_pixels")

    async def both() -> list[httpx.Response]:
        calls = (stand.client.http.post("/predict", content=AT_THE_BOUND) for _ in range(2))
        return list(await asyncio.gather(*calls))

    answers = stand.client.portal.call(both)
    refused = next(answer for answer in answers if answer.status_code != 200)
    assert [answer.status_code for answer in answers].count(200) == 1
    assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (
        429,
        "too_many_pixels",
        "1",
    )
    assert stand.client.post("/predict", content=AT_THE_BOUND).status_code == 200


def test_large_images_leave_a_worker_to_single_ones(make_stand: Callable[..., Stand]) -> None:
    now, most_seen = 0, 0

    async def upstream(request: httpx.Request) -> httpx.Response:
        nonlocal now, most_seen
        if request.content != AT_THE_BOUND:
            return stand.torchserve(request)
        now += 1
        most_seen = max(most_seen, now)
        await asyncio.sleep(0.05)
        now -= 1
        return stand.torchserve(request)

    stand = make_stand(upstream=upstream)
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200

    async def many() -> list[httpx.Response]:
        calls = (stand.client.http.post("/predict", content=AT_THE_BOUND) for _ in range(7))
        return list(await asyncio.gather(*calls))

    answers = stand.client.portal.call(many)
    assert most_seen == 1, "of two workers"
    assert [answer.status_code for answer in answers].count(200) == 5, "one has a turn, four wait"
    assert {answer.json()["code"] for answer in answers if answer.status_code != 200} == {"saturated"}


def test_upstream_batches_are_short_while_single_images_arrive(stand: Stand) -> None:
    assert stand.client.post("/predict", content=b"image-of-cat").status_code == 200
    stand.torchserve.calls.clear()
    post_batch(stand, [b"image-of-cat"] * 40)
    assert [call.content.count(b"image-of-") for call in stand.torchserve.calls] == [8] * 5


def test_upstream_batches_have_at_most_the_images_of_the_setting(make_stand: Callable[..., Stand]) -> None:
    stand = make_stand(chunk_images=4, max_batch_images=64)
    post_batch(stand, [b"image-of-cat"] * 50)
    assert max(call.content.count(b"image-of-") for call in stand.torchserve.calls) == 4


def test_a_failed_upstream_batch_fails_only_its_own_images(make_stand: Callable[..., Stand]) -> None:
    stand = make_stand(chunk_images=1)

    def fail_dogs(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(503, json={"type": "InternalServerException"}) if b"dog" in request.content else None

    stand.torchserve.answer = fail_dogs
    answer = post_batch(stand, [b"image-of-cat", b"image-of-dog", b"image-of-frog"])
    assert answer.status_code == 200
    assert names(answer) == ["cat", None, "frog"]
    assert answer.json()["results"][1]["error"]["code"] == "handler_failed"


def test_a_call_never_has_more_upstream_batches_in_flight_than_places(make_stand: Callable[..., Stand]) -> None:
    most = now = 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return stand.torchserve(request)

    stand = make_stand(upstream=count, chunk_images=1, in_flight_predict=3)
    assert post_batch(stand, [b"image-of-cat"] * 12).status_code == 200
    assert most == 3
    assert stand.app.state.gateway.admission.of("cifar10").predict.taken == 0


def test_a_place_is_held_until_torchserve_answers_also_when_the_caller_has_gone(
    make_stand: Callable[..., Stand],
) -> None:
    finish = asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await finish.wait()
        return stand.torchserve(request)

    stand = make_stand(upstream=slow, in_flight_predict=1, admission_wait_s=0.01)
    places = stand.app.state.gateway.admission.of("cifar10").predict

    async def scene() -> None:
        """Make one raw ASGI call whose caller disconnects while TorchServe works."""
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": b"x", "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            """Drop the message, because the caller has disconnected."""

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "raw_path": b"/predict",
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "root_path": "",
            "http_version": "1.1",
        }
        gone = asyncio.create_task(stand.app(scope, receive, send))
        await asyncio.sleep(0.05)
        assert places.taken == 1
        assert stand.app.state.gateway.agents.replicas[0].in_flight["cifar10/1.0.0"] == 1, "and the agent is told of it"
        refused = await stand.client.http.post("/predict", content=b"y")
        assert refused.status_code == 503
        finish.set()
        await gone
        assert places.taken == 0

    stand.client.portal.call(scene)


def test_a_caller_who_floods_does_not_keep_other_callers_out(make_stand: Callable[..., Stand]) -> None:
    async def upstream(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.1)
        return stand.torchserve(request)

    keys = tuple(f"{name}:{sha256(name.encode()).hexdigest()}:predict" for name in ("flood", "stranger"))
    stand = make_stand(upstream=upstream, keys=keys, in_flight_predict=4, chunk_images=1)

    def post(name: str) -> Awaitable[httpx.Response]:
        return stand.client.http.post("/predict", content=b"image-of-cat", headers={"x-api-key": name})

    async def scene() -> tuple[list[int], int]:
        flood = [asyncio.ensure_future(post("flood")) for _ in range(40)]
        await asyncio.sleep(0.05)
        stranger = await post("stranger")
        return [(await call).status_code for call in flood], stranger.status_code

    statuses, stranger = stand.client.portal.call(scene)
    assert stranger == 200
    assert 503 in statuses


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_saturation_is_503_with_retry_after(
    make_stand: Callable[..., Stand], route: str, assert_problem: Callable[..., None]
) -> None:
    hold = asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await hold.wait()
        return stand.torchserve(request)

    limits = {"in_flight_predict": 1, "in_flight_explain": 1, "in_flight_backward": 1}
    stand = make_stand(upstream=slow, **limits, admission_wait_s=0.01)
    body = stand.body(route, IMAGE)

    async def both() -> tuple[httpx.Response, httpx.Response]:
        first = asyncio.create_task(stand.client.http.post(route, **body))
        await asyncio.sleep(0.05)
        second = await stand.client.http.post(route, **body)
        hold.set()
        return await first, second

    served, refused = stand.client.portal.call(both)
    assert served.status_code == 200
    assert_problem(refused, 503, "saturated")
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_not_ready_and_draining_agents_are_503(stand: Stand, route: str, assert_problem: Callable[..., None]) -> None:
    body = stand.body(route, IMAGE)
    stand.agent.draining = True
    stand.wait_until(lambda: stand.client.get("/readyz").status_code == 503)
    assert_problem(stand.client.post(route, **body), 503, "not_ready")
