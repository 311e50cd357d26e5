"""The public document of an explanation is the same for handlers of every release."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts import wire
from gateway.api.evidence import expand_rows

if TYPE_CHECKING:
    from conftest import Stand

IMAGE = b"image-of-dog"
JSON = {"accept": "application/json"}


def test_a_heatmap_comes_as_rows_as_base64_or_not_at_all(evidence_stand: Stand) -> None:
    compact = evidence_stand.explain("?heatmap=base64")["heatmap"]
    assert (compact["height"], compact["width"], base64.b64decode(compact["values"])) == (1, 3, bytes((0, 128, 255)))
    assert "heatmap" not in evidence_stand.explain("?heatmap=none")


def test_every_byte_of_a_heatmap_becomes_its_share_of_255() -> None:
    (row,) = expand_rows([bytes(range(256))])
    assert row == tuple(round(level / 255, 4) for level in range(256))
    assert expand_rows([b"\xff", b"\x00"]) == [(1.0,), (0.0,)]


def test_the_answer_set_and_the_test_come_when_asked_for(evidence_stand: Stand) -> None:
    document = evidence_stand.explain("?coverage=0.9&test=true")
    assert document["classes"] == [{"class": "dog", "confidence": 0.9}]
    assert document["test"]["verdict"] == "The hot region is enough."
    assert evidence_stand.torchserve.asked()[1].images == (wire.ImageOptions(explain=True, coverage=0.9, test=True),)


def test_heatmaps_of_many_numbers_do_not_come_as_rows(evidence_stand: Stand) -> None:
    heatmap = wire.dump_heatmap(2000, 1100, bytes(2_200_000))
    entry = wire.dump_evidence(("dog", 0.9), target=("dog", 0.9), method="cam", strength=1.0, heatmap=heatmap)
    body = json.dumps({"results": [entry] * 2})
    evidence_stand.torchserve.answer = lambda _: httpx.Response(200, content=body)
    files = [("file", ("x", IMAGE))] * 4

    refused = evidence_stand.client.post("/explain/batch", files=files)
    assert (refused.status_code, refused.json()["parameter"]) == (400, "heatmap")
    assert "heatmap=base64" in refused.json()["detail"]
    assert evidence_stand.client.post("/explain/batch?heatmap=base64", files=files).status_code == 200


def test_a_version_without_evidence_gives_what_it_has_and_the_reason_for_the_rest(stand: Stand) -> None:
    document = stand.explain("?target=dog&coverage=0.9&test=true")
    reason = {"unavailable": "this version was packed without evidence: pack it again with gradserve package"}
    assert document.pop("target") == {"class": "dog", "confidence": None}
    assert document["heatmap"] == [[0.0, 1.0]]
    names = ("strength", "familiar", "familiarity", "similar", "classes", "test")
    assert [document[name] for name in names] == [reason] * 6
    assert "layer" not in document
    assert stand.explain()["target"] == {"class": "cat", "confidence": 0.9}
    assert stand.explain("?heatmap=base64")["heatmap"] == wire.dump_heatmap(1, 2, bytes((0, 255)))
    files = [("file", ("x", b"image-of-cat"))] * 2
    assert len(stand.client.post("/explain/batch", files=files).json()["results"]) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"heatmap": {"height": 2, "width": 2, "values": "AAAA"}},
        {"heatmap": {"height": 1, "width": 3, "values": "no base64"}},
        {"heatmap": None},
        {"method": None},
    ],
)
def test_an_explanation_of_another_form_is_502(evidence_stand: Stand, change: dict[str, Any]) -> None:
    heatmap = wire.dump_heatmap(1, 3, bytes(3))
    entry = wire.dump_evidence(("dog", 0.9), target=("dog", 0.9), method="cam", strength=1.0, heatmap=heatmap)
    entry = {name: value for name, value in (entry | change).items() if value is not None}
    evidence_stand.torchserve.answer = lambda _: httpx.Response(200, json={"results": [entry]})
    answer = evidence_stand.client.post("/explain", content=IMAGE, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (502, "engine_nonsense")
