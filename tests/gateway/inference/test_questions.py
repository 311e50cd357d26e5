"""Questions about an image: refused if the version cannot answer them, and sent on its wire to the right workers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from contracts import model as model_contract
from contracts import wire
from gateway.inference import questions
from gateway.inference.questions import Question
from gateway.refusals import BadParameter

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

    from contracts.model import Contract

IMAGE = b"image-of-dog"


def test_an_unknown_target_is_400_with_the_handlers_facts(stand: Stand, assert_problem: Callable[..., None]) -> None:
    answer = stand.client.post("/explain?target=unicorn", content=IMAGE)
    assert_problem(answer, 400, "unknown_target")
    assert answer.json()["classes"] == ["cat", "dog", "frog"]


@pytest.mark.parametrize(
    ("query", "code", "known"),
    [("target=unicorn", "unknown_target", "use one of "), ("method=guess", "unknown_method", "use ")],
)
def test_an_unknown_class_or_method_is_refused_before_an_image_is_sent_with_those_that_there_are(
    evidence_stand: Stand, query: str, code: str, known: str
) -> None:
    refused = evidence_stand.client.post(f"/explain?{query}", content=IMAGE)
    problem = refused.json()
    names = problem["classes" if code == "unknown_target" else "methods"]
    assert (refused.status_code, problem["code"]) == (400, code)
    assert problem["detail"].endswith(known + ", ".join(names))
    assert not evidence_stand.torchserve.calls


def test_a_method_with_a_backward_pass_goes_to_the_explain_entry(evidence_stand: Stand) -> None:
    document = evidence_stand.explain("?method=gradcam")
    path, options = evidence_stand.torchserve.asked()
    assert (path, document["method"]) == ("/explanations/cifar10-explain/1.0.0", "gradcam")
    assert options.images == (wire.ImageOptions(explain=True, method="gradcam"),)


def contract_of(make_version: Callable[..., dict[str, Any]], schema: int) -> Contract:
    return model_contract.parse(make_version(schema=schema)["contract"])


def test_the_wire_and_the_entry_of_an_explanation_follow_from_the_contract(
    make_version: Callable[..., dict[str, Any]],
) -> None:
    old, new = (contract_of(make_version, schema) for schema in (2, 3))
    assert [questions.wire_of(contract) for contract in (None, old, new)] == [1, 1, 2]
    assert [questions.explaining_entry(None, contract) for contract in (None, old, new)] == [
        "explain",
        "explain",
        "predict",
    ]
    assert questions.explaining_entry("gradcam", new) == "explain"


def test_a_question_travels_by_name_on_wire_1_and_by_number_on_wire_2(
    make_version: Callable[..., dict[str, Any]],
) -> None:
    question = Question(target="frog", method="gradcam", similar=2)
    old, new = (questions.wire_options(question, contract_of(make_version, schema)) for schema in (2, 3))
    assert old == wire.Options(target="frog", method="gradcam", format="json")
    image = wire.ImageOptions(explain=True, target=2, method="gradcam", similar=2)
    assert new == wire.Options(images=(image,), format="json")


def test_a_question_without_a_method_is_answered_in_the_forward_pass_where_only_that_is_possible(
    make_version: Callable[..., dict[str, Any]],
) -> None:
    contract = contract_of(make_version, 3)
    backward = replace(contract, explain=replace(contract.explain, method="gradcam"))
    asked = [questions.wire_options_in_forward(Question(), each).images[0].method for each in (contract, backward)]
    assert asked == [None, "sharpcam"], "the default needs no name"
    with pytest.raises(BadParameter, match="packed without them"):
        questions.wire_options_in_forward(Question(), contract_of(make_version, 2))


def test_an_images_share_of_an_upstream_batch_is_at_least_what_travels(
    make_version: Callable[..., dict[str, Any]],
) -> None:
    contract = contract_of(make_version, 3)
    contract = replace(contract, classes=tuple(f"class {number:040}" for number in range(1000)))
    longest = wire.ImageOptions(True, 99_999, "m" * 60, 0.999, test=True, similar=10)
    share = questions.share_of(longest, contract)
    alone, twice = (len(wire.dump_options(wire.Options(images=(longest,) * count))) for count in (1, 2))
    assert share.header_bytes >= twice - alone
    side = contract.input.height
    entry = wire.dump_evidence(
        (contract.classes[0], 0.123456),
        target=(contract.classes[1], 0.123456),
        method="m" * 60,
        strength=1.234567,
        heatmap=wire.dump_heatmap(side, side, bytes(side * side)),
        familiar=True,
        familiarity=0.123456,
        similar=[{"id": 10**7, "class": contract.classes[0], "similarity": 0.1234}] * 20,
        classes=[{"class": name[-20:], "confidence": 0.123456} for name in contract.classes],
        test={"kept": 0.123456, "removed": 0.123456, "verdict": "v" * 200},
    )
    assert share.answer_bytes >= len(wire.dump_json(entry))
    assert share.passes == 3


def test_a_prediction_has_the_smallest_share() -> None:
    assert questions.share_of(wire.PREDICT, None) == questions.PREDICTION_SHARE == (3, 0, 1)
