"""Images and predictions as V2 tensors, in JSON and in binary; what is no V2 call is refused."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from contracts import wire

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import Stand

INFER = "/v2/models/cifar10/infer"
IMAGE = b"image-of-dog"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"inputs":[]}',
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["AA=="]}]}',
        b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1],"data":[1]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["not base64!"]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[2],"data":["AA=="]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[0],"data":[]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":"1","data":["AA=="]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":5}}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}],"outputs":[{"name":"nope"}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[%b1],"data":["AA=="]}]}' % (b"1," * 1_000_000),
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}],"outputs":[%b]}'
        % b",".join([b'{"name":"class"}'] * 3),
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}],"parameters":[]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":[%b]}]}' % b",".join([b"[]"] * 1_000_000),
        b'{"id":5,"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}]}',
    ],
)
def test_a_broken_v2_call_is_400(stand: Stand, body: bytes, assert_problem: Callable[..., None]) -> None:
    assert_problem(stand.client.post(INFER, content=body), 400, "bad_json")


@pytest.mark.parametrize("binary", [True, False])
def test_v2_takes_and_gives_tensors_in_binary_and_in_json(stand: Stand, binary: bool) -> None:
    images = [b"image-of-dog", b"image-of-frog"]
    tensor: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [2, 1]}
    blob = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    if binary:
        tensor["parameters"] = {"binary_data_size": len(blob)}
    else:
        tensor["data"] = [["aW1hZ2Utb2YtZG9n"], ["aW1hZ2Utb2YtZnJvZw=="]]
    head = json.dumps({"id": "7", "inputs": [tensor], "parameters": {"binary_data_output": binary}}).encode()
    answer = stand.client.post(
        "/v2/models/cifar10/versions/1.0.0/infer",
        content=head + blob if binary else head,
        headers={"inference-header-content-length": str(len(head))} if binary else {},
    )
    assert answer.status_code == 200
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    data = json.loads(answer.content[:length])
    assert (data["id"], data["model_name"], data["model_version"]) == ("7", "cifar10", "1.0.0")
    assert [output["shape"] for output in data["outputs"]] == [[2], [2]]
    if binary:
        assert answer.content[length:].startswith(b"\x03\0\0\0dog\x04\0\0\0frog")
        assert [output["parameters"]["binary_data_size"] for output in data["outputs"]] == [15, 8]
    else:
        assert data["outputs"][0]["data"] == ["dog", "frog"]


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
    assert evidence_stand.torchserve.asked()[1].images[0] == wire.ImageOptions(explain=True, coverage=0.8, similar=0)
    binary = infer(evidence_stand, ["familiar"], binary_data_output=True)
    assert binary.content.endswith(b"\x01\x01")


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
