"""Metrics: bounded labels, and each failure counts for the version that failed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.auth import keys
from gateway.request_context import Caller, RequestContext
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import Stand


def test_requests_are_counted_by_route_status_and_version(stand: Stand) -> None:
    stand.client.post("/predict", content=b"x")
    stand.client.post("/predict", content=b"")
    stand.client.post("/predict/batch", files=[("file", ("x", b"image-of-dog"))] * 3)
    assert stand.metric("gateway_requests_total", route="/predict", status="200") == 1
    assert stand.metric("gateway_requests_total", route="/predict", status="400") == 1
    assert stand.metric("gateway_refused_total", code="empty_body") == 1
    by_version = {"version": "1.0.0", "kind": "predict"}
    assert stand.metric("gateway_version_requests_total", **by_version, outcome="ok") == 1
    assert stand.metric("gateway_model_seconds_count", **by_version) == 1
    assert stand.metric("gateway_model_seconds_count", version="1.0.0", kind="batch") == 1
    assert stand.metric("gateway_stage_seconds_count", route="/predict", stage="model") == 1
    assert stand.metric("gateway_confidence_count", **{"class": "dog", "version": "1.0.0"}) == 3


def test_unknown_paths_and_methods_share_one_label(stand: Stand) -> None:
    for path in ("/a", "/b", "/v2/models/x/y/z"):
        stand.client.get(path)
    stand.client.request("BREW", "/c")
    assert stand.metric("gateway_requests_total", route="unmatched", status="404") == 4
    assert "/a" not in stand.client.get("/metrics").text
    assert "BREW" not in stand.client.get("/metrics").text


def test_a_v2_path_is_counted_by_its_pattern(stand: Stand) -> None:
    stand.client.get("/v2/models/cifar10/versions/1.0.0/ready")
    route = "/v2/models/{model}/versions/{version}/ready"
    assert stand.metric("gateway_requests_total", route=route, status="200") == 1


@pytest.mark.parametrize("kind", ["predict", "batch", "explain"])
def test_a_versions_failures_are_counted_as_its_own_and_not_timed(stand: Stand, kind: str) -> None:
    def call(image: bytes) -> None:
        if kind == "batch":
            # The other image has a prediction, so the call is answered.
            files = [("file", ("x", b"image-of-dog")), ("file", ("x", image))]
            assert stand.client.post("/predict/batch", files=files).status_code == 200
        else:
            assert stand.client.post(f"/{kind}", content=image).status_code != 200

    call(b"bad:handler_failed")
    by_version = {"version": "1.0.0", "kind": kind}
    assert stand.metric("gateway_version_requests_total", **by_version, outcome="handler_failed") == 1
    assert stand.metric("gateway_model_seconds_count", **by_version) == 0
    call(b"bad:image_unreadable")
    outcome = "ok" if kind == "batch" else "image_unreadable"
    assert stand.metric("gateway_version_requests_total", **by_version, outcome=outcome) == 1


@pytest.mark.parametrize(("timeout_ms", "outcome"), [(100, "caller_deadline"), (600, "deadline_passed")])
def test_a_callers_short_deadline_does_not_count_against_the_version(
    make_stand: Callable[..., Stand], timeout_ms: int, outcome: str
) -> None:
    async def never(_request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        raise AssertionError

    stand = make_stand(upstream=never, timeout_s=1.0)
    headers = {"x-timeout-ms": str(timeout_ms)}
    assert stand.client.post("/predict", content=b"image-of-dog", headers=headers).status_code == 504
    assert stand.metric("gateway_version_requests_total", version="1.0.0", outcome=outcome) == 1
    assert stand.metric("gateway_version_requests_total", version="1.0.0") == 1


def test_a_request_refused_before_a_version_was_chosen_counts_for_no_version(stand: Stand) -> None:
    stand.client.post("/predict", content=b"")
    assert stand.metric("gateway_version_requests_total", version="1.0.0") == 0


def test_many_classes_share_a_label_and_hide_no_failure() -> None:
    metrics = Metrics()

    def finish(name: str, code: str = "") -> None:
        context = RequestContext("a request")
        context.route, context.model, context.version, context.code = "/predict", "cifar10", "1.0.0", code
        context.stages["model"] = 0.001
        context.entries = [] if code else [{"class": name, "confidence": 0.9}]
        metrics.finish("POST", context)

    for number in range(2100):
        finish(f"c{number}")
    finish("", "handler_failed")
    lines = metrics.render().decode().splitlines()
    assert 'gateway_confidence_count{class="c1999",model="cifar10",version="1.0.0"} 1.0' in lines
    assert 'gateway_confidence_count{class="other",model="cifar10",version="1.0.0"} 100.0' in lines
    assert (
        'gateway_version_requests_total{kind="predict",model="cifar10",outcome="handler_failed",version="1.0.0"} 1.0'
        in lines
    )
    assert 'gateway_refused_total{code="handler_failed",model="cifar10"} 1.0' in lines


def test_images_are_counted_by_their_caller(make_stand: Callable[..., Stand]) -> None:
    secret, key = keys.make_key("a", ["predict", "explain", "read"])
    client = make_stand(keys=(f"a:{key.sha256}:predict+explain+read",)).client
    headers = {"x-api-key": secret}
    files = [("file", ("x", content)) for content in (b"image-of-dog", b"bad:image_unreadable", b"image-of-cat")]
    client.post("/predict", content=b"x", headers=headers)
    client.post("/predict/batch", files=files, headers=headers)
    client.post("/explain", content=b"x", headers=headers)
    client.post("/explain", content=b"bad:image_unreadable", headers=headers)
    assert 'gateway_caller_images_total{caller="a"} 4.0' in client.get("/metrics", headers=headers).text


def test_many_keys_share_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.telemetry.metrics.MAX_KEY_LABELS", 2)
    metrics = Metrics()
    for name in ("a", "b", "c", "d", "a"):
        context = RequestContext("r1")
        context.status, context.caller = 200, Caller(name, name, f"key-of-{name}")
        metrics.finish("GET", context)
    lines = metrics.render().decode().splitlines()
    assert 'gateway_caller_requests_total{caller="a",key="key-of-a",status="200"} 2.0' in lines
    assert 'gateway_caller_requests_total{caller="other",key="",status="200"} 2.0' in lines
    assert not [line for line in lines if "key-of-c" in line]


def test_a_refusals_time_does_not_hide_those_of_served_calls() -> None:
    metrics = Metrics()
    for code in ("", "saturated"):
        context = RequestContext("r1")
        context.route, context.status, context.code = "/predict", 503 if code else 200, code
        metrics.finish("POST", context)
    lines = metrics.render().decode().splitlines()
    assert 'gateway_request_seconds_count{route="/predict"} 1.0' in lines
    assert 'gateway_refused_total{code="saturated",model=""} 1.0' in lines


def test_a_shadows_shifts_up_and_down_are_summed_apart() -> None:
    metrics = Metrics()
    for shift in (0.25, -0.5, 0.125):
        metrics.observe_shift("cifar10", "2.0.0", shift)
    lines = metrics.render().decode().splitlines()
    assert 'gateway_shadow_shift_total{direction="up",model="cifar10",version="2.0.0"} 0.375' in lines
    assert 'gateway_shadow_shift_total{direction="down",model="cifar10",version="2.0.0"} 0.5' in lines
