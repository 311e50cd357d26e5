"""The routes of the V2 protocol: their metadata, and errors in the form that V2 clients read."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import httpx

from gateway.settings import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

IMAGE = b"image-of-dog"
INFER = "/v2/models/cifar10/infer"


def test_an_unknown_version_or_model_is_404_in_v2(stand: Stand, assert_problem: Callable[..., None]) -> None:
    body = stand.body(INFER, IMAGE)
    unknown = stand.client.post("/v2/models/cifar10/versions/9.9.9/infer", **body)
    assert_problem(unknown, 404, "version_unknown")
    assert unknown.json()["error"] == unknown.json()["detail"], "V2 clients read `error`"
    assert_problem(stand.client.post("/v2/models/other/infer", **body), 404, "model_unknown")
    assert_problem(stand.client.get("/v2/models/cifar10/versions/9.9.9"), 404, "version_unknown")


def test_v2_names_the_outputs_that_the_version_has(stand: Stand, evidence_stand: Stand) -> None:
    told = [
        [output["name"] for output in each.client.get("/v2/models/cifar10").json()["outputs"]]
        for each in (stand, evidence_stand)
    ]
    assert told == [["class", "confidence"], ["class", "confidence", "familiar", "familiarity", "classes"]]


def test_a_v2_call_whose_image_got_no_place_has_retry_after(make_stand: Callable[..., Stand]) -> None:
    stand = make_stand(chunk_images=1)

    def answer(request: httpx.Request) -> httpx.Response | None:
        return (
            httpx.Response(503, content=b'{"type": "ServiceUnavailableException"}') if b"b" in request.content else None
        )

    stand.torchserve.answer = answer
    images = [base64.b64encode(image).decode() for image in (b"a", b"b")]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": images}
    refused = stand.client.post("/v2/models/cifar10/infer", json={"inputs": [tensor]})
    assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "saturated", "1")


def test_the_metadata_describe_the_server_the_model_and_each_version(stand: Stand) -> None:
    assert stand.client.get("/v2").json() == {
        "name": "gradserve",
        "version": VERSION,
        "extensions": ["binary_tensor_data"],
    }
    model = stand.client.get("/v2/models/cifar10").json()
    assert model == {
        "name": "cifar10",
        "versions": ["1.0.0"],
        "platform": "torchserve",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "class", "datatype": "BYTES", "shape": [-1]},
            {"name": "confidence", "datatype": "FP32", "shape": [-1]},
        ],
    }
    assert stand.client.get("/v2/models/cifar10/versions/1.0.0").json() == model


def test_a_version_is_ready_while_its_workers_are(stand: Stand) -> None:
    paths = ("/v2/models/cifar10/ready", "/v2/models/cifar10/versions/1.0.0/ready")
    for path in paths:
        assert stand.client.get(path).json() == {"name": "cifar10", "version": "1.0.0", "ready": True}
    stand.agent.versions[0]["routable"] = False
    stand.wait_until(lambda: stand.client.get(paths[0]).status_code == 503)
    assert stand.client.get(paths[1]).status_code == 503
    assert stand.client.get("/v2/health/live").json() == {"live": True}
