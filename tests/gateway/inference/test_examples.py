"""Thumbnails of training images: asked of the workers once, kept within bounds, and refused where there are none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts import model as model_contract
from contracts import wire
from gateway.inference.examples import MOST_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

EXAMPLES = "/models/cifar10/versions/1.0.0/examples"


def test_a_training_image_is_sent_once_by_the_handler_and_may_be_kept_by_the_caller(evidence_stand: Stand) -> None:
    client = evidence_stand.client
    first, second = client.get(f"{EXAMPLES}/3.png"), client.get(f"{EXAMPLES}/3.png")
    assert first.content == second.content == b"\x89PNG fake image3"
    assert (first.headers["content-type"], len(evidence_stand.torchserve.calls)) == ("image/png", 1)
    assert first.headers["cache-control"] == "private, max-age=86400"
    path, options = evidence_stand.torchserve.asked()
    assert (path, options.example) == ("/predictions/cifar10/1.0.0", 3)
    again = client.get(f"{EXAMPLES}/3.png", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(f"{EXAMPLES}/4.png").headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"{EXAMPLES}/10.png", 404, "unknown_example"),  # the contract has ten
        (f"{EXAMPLES}/9.png", 404, "unknown_example"),  # the handler has eight
        (f"{EXAMPLES}/99999999999.png", 400, "bad_parameter"),
        (f"{EXAMPLES}/-1.png", 400, "bad_parameter"),
        (f"{EXAMPLES}/1_0.png", 400, "bad_parameter"),
        (f"{EXAMPLES}/..%2F..%2Fetc%2Fpasswd.png", 404, "route_unknown"),
        (f"{EXAMPLES}/x.png", 400, "bad_parameter"),
        (f"{EXAMPLES}/1.jpg", 404, "route_unknown"),
        ("/models/cifar10/versions/9.9.9/examples/1.png", 404, "version_unknown"),
        ("/models/cifar10/versions/..%00/examples/1.png", 400, "bad_parameter"),
        ("/models/other/versions/1.0.0/examples/1.png", 404, "model_unknown"),
    ],
)
def test_an_unknown_training_image_is_refused(evidence_stand: Stand, path: str, status: int, code: str) -> None:
    refused = evidence_stand.client.get(path)
    assert (refused.status_code, refused.json()["code"]) == (status, code)


def test_a_version_without_thumbnails_has_no_training_images_and_no_links(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    contract = model_contract.parse(make_version(schema=3)["contract"])
    assert contract.evidence is not None
    assert contract.evidence.similar is not None
    bare = replace(contract.evidence, similar=replace(contract.evidence.similar, thumbnails=False))
    without = model_contract.dump(replace(contract, evidence=bare))
    stand = make_stand(agent=make_agent([make_version(schema=3, contract=without)]))
    assert stand.explain("?similar=1")["similar"] == [{"id": 0, "class": "dog", "similarity": 0.9}]
    refused = stand.client.get(f"{EXAMPLES}/1.png")
    assert (refused.status_code, refused.json()["examples"]) == (404, 0)
    assert "packed without thumbnails" in refused.json()["detail"]


def test_training_images_kept_by_the_gateway_are_bounded(
    evidence_stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.inference.examples.MOST_KEPT", 2)
    for example in (0, 1, 0, 2, 0, 1):
        assert evidence_stand.client.get(f"{EXAMPLES}/{example}.png").status_code == 200
    examples = [wire.parse_options(call.headers["x-gradserve"]).example for call in evidence_stand.torchserve.calls]
    assert examples == [0, 1, 2, 1], "the one that was not used for longest is dropped"


def test_another_archive_of_the_same_version_gives_its_own_thumbnails(
    evidence_stand: Stand, make_plan: Callable[..., dict[str, Any]]
) -> None:
    client, path = evidence_stand.client, f"{EXAMPLES}/3.png"
    first = client.get(path)
    plan = make_plan(revision=2)
    plan["stable"] = {**plan["stable"], "sha256": "9" * 64}
    evidence_stand.plan.write_text(json.dumps(plan), encoding="utf-8")
    evidence_stand.wait_until(lambda: evidence_stand.app.state.gateway.router.revision == 2)
    assert client.get(path).headers["etag"] != first.headers["etag"]
    assert len(evidence_stand.torchserve.calls) == 2


def test_a_thumbnail_of_many_bytes_is_answered_and_not_kept(evidence_stand: Stand) -> None:
    large = wire.PNG_SIGNATURE + bytes(MOST_BYTES)
    evidence_stand.torchserve.answer = lambda _: httpx.Response(200, content=large)
    for _ in range(2):
        assert evidence_stand.client.get(f"{EXAMPLES}/3.png").content == large
    assert len(evidence_stand.torchserve.calls) == 2
