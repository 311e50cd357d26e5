"""Explanations as one public document, from handlers of every release, and the training images that they name."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts import model as model_contract
from contracts import wire
from gateway.api import schemas
from gateway.api.evidence import expand_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

IMAGE = b"image-of-dog"
JSON = {"accept": "application/json"}
EXAMPLES = "/models/cifar10/versions/1.0.0/examples"
INFER = "/v2/models/cifar10/infer"


def explain(stand: Stand, query: str = "") -> dict[str, Any]:
    answer = stand.client.post(f"/explain{query}", content=IMAGE, headers=JSON)
    assert answer.status_code == 200, answer.text
    schemas.Explanation.model_validate_json(answer.content)
    return dict(answer.json())


def asked(stand: Stand) -> tuple[str, wire.Options]:
    """Return the path and the options of the last call to TorchServe."""
    call = stand.torchserve.calls[-1]
    return call.url.path, wire.parse_options(call.headers[wire.OPTIONS_HEADER])


def test_the_default_explanation_is_made_by_the_workers_that_predict(evidence_stand: Stand) -> None:
    document = explain(evidence_stand, "?target=frog&similar=1")
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
    path, options = asked(evidence_stand)
    assert path == "/predictions/cifar10/1.0.0"
    assert options.images == (wire.ImageOptions(explain=True, target=2, similar=1),)


def test_the_answer_set_and_the_test_come_when_asked_for(evidence_stand: Stand) -> None:
    document = explain(evidence_stand, "?coverage=0.9&test=true")
    assert document["classes"] == [{"class": "dog", "confidence": 0.9}]
    assert document["test"]["verdict"] == "The hot region is enough."
    assert asked(evidence_stand)[1].images == (wire.ImageOptions(explain=True, coverage=0.9, test=True),)


def test_a_heatmap_comes_as_rows_as_base64_or_not_at_all(evidence_stand: Stand) -> None:
    compact = explain(evidence_stand, "?heatmap=base64")["heatmap"]
    assert (compact["height"], compact["width"], base64.b64decode(compact["values"])) == (1, 3, bytes((0, 128, 255)))
    assert "heatmap" not in explain(evidence_stand, "?heatmap=none")


def test_every_byte_of_a_heatmap_becomes_its_share_of_255() -> None:
    (row,) = expand_rows([bytes(range(256))])
    assert row == tuple(round(level / 255, 4) for level in range(256))
    assert expand_rows([b"\xff", b"\x00"]) == [(1.0,), (0.0,)]


def test_a_method_with_a_backward_pass_goes_to_the_explain_entry(evidence_stand: Stand) -> None:
    document = explain(evidence_stand, "?method=gradcam")
    path, options = asked(evidence_stand)
    assert (path, document["method"]) == ("/explanations/cifar10-explain/1.0.0", "gradcam")
    assert options.images == (wire.ImageOptions(explain=True, method="gradcam"),)


def test_without_explain_workers_the_default_method_and_readiness_stay(evidence_stand: Stand) -> None:
    stand = evidence_stand
    stand.agent.versions[0]["explain"] = {"ready": 0, "wanted": 1, "pending": 0, "capacity": 100}
    stand.wait_until(lambda: stand.client.get("/health").json()["status"] == "degraded")
    assert stand.client.get("/readyz").status_code == 200
    assert explain(stand)["method"] == "sharpcam"
    refused = stand.client.post("/explain?method=gradcam", content=IMAGE)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")


@pytest.mark.parametrize(("query", "code"), [("target=unicorn", "unknown_target"), ("method=guess", "unknown_method")])
def test_an_unknown_class_or_method_is_refused_before_an_image_is_sent(
    evidence_stand: Stand, query: str, code: str
) -> None:
    refused = evidence_stand.client.post(f"/explain?{query}", content=IMAGE)
    assert (refused.status_code, refused.json()["code"]) == (400, code)
    assert not evidence_stand.torchserve.calls


def test_an_overlay_comes_from_the_workers_that_predict_and_its_headers_say_what_it_shows(
    evidence_stand: Stand,
) -> None:
    query = "?target=frog&alpha=0.25&size=64&coverage=0.9&test=true"
    answer = evidence_stand.client.post(f"/explain{query}", content=IMAGE)
    assert answer.headers["content-type"] == "image/png"
    told = [answer.headers[f"x-{name}"] for name in ("class", "confidence", "target", "method", "familiar")]
    assert told == ["dog", "0.9", "frog", "sharpcam", "true"]
    path, options = asked(evidence_stand)
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
    assert {asked(evidence_stand)[0]} == {"/predictions/cifar10/1.0.0"}


def test_many_images_are_explained_one_by_one_where_that_needs_a_backward_pass(evidence_stand: Stand) -> None:
    files = [("file", ("x", image)) for image in (b"image-of-dog", b"bad:image_unreadable", b"image-of-frog")]
    results = evidence_stand.client.post("/explain/batch?method=gradcam", files=files).json()["results"]
    assert [entry.get("class") for entry in results] == ["dog", None, "frog"]
    assert [call.url.path for call in evidence_stand.torchserve.calls] == ["/explanations/cifar10-explain/1.0.0"] * 3


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
    document = explain(stand, "?target=dog&coverage=0.9&test=true")
    reason = {"unavailable": "this version was packed without evidence: pack it again with gradserve package"}
    assert document.pop("target") == {"class": "dog", "confidence": None}
    assert document["heatmap"] == [[0.0, 1.0]]
    names = ("strength", "familiar", "familiarity", "similar", "classes", "test")
    assert [document[name] for name in names] == [reason] * 6
    assert "layer" not in document
    assert explain(stand)["target"] == {"class": "cat", "confidence": 0.9}
    assert explain(stand, "?heatmap=base64")["heatmap"] == wire.dump_heatmap(1, 2, bytes((0, 255)))
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


def test_a_training_image_is_sent_once_by_the_handler_and_may_be_kept_by_the_caller(evidence_stand: Stand) -> None:
    client = evidence_stand.client
    first, second = client.get(f"{EXAMPLES}/3.png"), client.get(f"{EXAMPLES}/3.png")
    assert first.content == second.content == b"\x89PNG fake image3"
    assert (first.headers["content-type"], len(evidence_stand.torchserve.calls)) == ("image/png", 1)
    assert first.headers["cache-control"] == "private, max-age=86400"
    path, options = asked(evidence_stand)
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
    assert explain(stand, "?similar=1")["similar"] == [{"id": 0, "class": "dog", "similarity": 0.9}]
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


def infer(stand: Stand, outputs: list[str], **parameters: Any) -> httpx.Response:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": [base64.b64encode(IMAGE).decode()] * 2}
    wanted = [{"name": name} for name in outputs]
    return stand.client.post(INFER, json={"inputs": [tensor], "outputs": wanted, "parameters": parameters})


def test_v2_gives_familiarity_and_answer_sets_as_outputs(evidence_stand: Stand) -> None:
    answer = infer(evidence_stand, ["class", "familiar", "familiarity", "classes"], coverage=0.8)
    assert answer.status_code == 200, answer.text
    outputs = {
        output["name"]: (output["datatype"], output["shape"], output["data"]) for output in answer.json()["outputs"]
    }
    assert outputs == {
        "class": ("BYTES", [2], ["dog", "dog"]),
        "familiar": ("BOOL", [2], [True, True]),
        "familiarity": ("FP32", [2], [0.75, 0.75]),
        "classes": ("BYTES", [2], ['["dog"]', '["dog"]']),
    }
    assert asked(evidence_stand)[1].images[0] == wire.ImageOptions(explain=True, coverage=0.8, similar=0)
    binary = infer(evidence_stand, ["familiar"], binary_data_output=True)
    assert binary.content.endswith(b"\x01\x01")


def test_v2_names_the_outputs_that_the_version_has(stand: Stand, evidence_stand: Stand) -> None:
    told = [
        [output["name"] for output in each.client.get("/v2/models/cifar10").json()["outputs"]]
        for each in (stand, evidence_stand)
    ]
    assert told == [["class", "confidence"], ["class", "confidence", "familiar", "familiarity", "classes"]]


@pytest.mark.parametrize("output", ["familiar", "familiarity", "classes"])
def test_v2_refuses_an_output_that_the_version_does_not_have(stand: Stand, output: str) -> None:
    refused = infer(stand, [output])
    assert (refused.status_code, refused.json()["code"], refused.json()["parameter"]) == (
        400,
        "bad_parameter",
        "outputs",
    )


@pytest.mark.parametrize("parameters", [{"coverage": 1}, {"coverage": "0.9"}, {"top_k": 2}])
def test_v2_refuses_impossible_parameters_of_answer_sets(evidence_stand: Stand, parameters: dict[str, Any]) -> None:
    assert infer(evidence_stand, ["classes"], **parameters).json()["code"] == "bad_parameter"
