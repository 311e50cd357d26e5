"""The contract: schemas 1 and 2 are read and kept, schema 3 is exact, and each refusal names the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts import model
from contracts.evidence import AnswerSet, Evidence, Familiar, HeatmapFigures, Similar
from contracts.model import (
    Accepted,
    Ancestor,
    Contract,
    ContractError,
    Engine,
    Explanation,
    Figures,
    Input,
    Measured,
    Provenance,
)

RELEASED = Path(__file__).parents[2] / "model_store" / "released" / "contract.json"

SHA256 = "f9" * 32

FIRST = Accepted(
    Figures(0.96, 5000, Measured(0.963, 0.13, 0.01), Measured(0.961, 0.14, 0.02), 0.99, 0.01, 500, -0.3),
    run_id="a1",
    recipe={"data": "cifar10", "cycles": [{"epochs": 2}]},
    provenance=Provenance(SHA256, 45_000, 5000, 180, 831.7, 1, ({"python": "3.11", "threads": "2"},)),
)

SECOND = replace(FIRST, figures=Figures(0.97), ancestor=Ancestor("cifar10", "0.1", FIRST, SHA256))
THIRD = replace(FIRST, ancestor=Ancestor("cifar10", "0.2", SECOND))
CONTRACT = Contract(
    "cifar10", "1.0.0", ("cat", "dog"), Input(32, 24, (0.1, 0.2, 0.3), (1.0, 1.0, 0.5)), "resnet18_small",
    Explanation("layer3+layer4", "gradcam", ("gradcam",)), Engine("openvino", "int8", 0.6), Engine(), THIRD, "2026",
)  # fmt: skip

HEAT = HeatmapFigures(0.96, 1.0, 0.92, 0.99, -0.4, 0.2, (("fc", 0.2), ("layer4", 0.1)), 0.8, 0.4, 0.3)
NEWEST = replace(
    CONTRACT,
    schema=3,
    explain=replace(CONTRACT.explain, sharp_layer="layer3", forward=("gradcam",)),
    evidence=Evidence(Familiar("knn", 10, 5000), Similar(5000, True, 0.97), AnswerSet(5000), (("similar", "too few"),)),
    accepted=replace(
        FIRST,
        figures=replace(
            FIRST.figures,
            explanations=HEAT,
            random_heat=HeatmapFigures(0.25),
            familiarity=(("noise", 0.99),),
            engine_heatmap_correlation=0.97,
        ),
        ancestor=Ancestor("cifar10", "0.1", FIRST, SHA256),
    ),
)

SMALLEST = Contract("m", "1", ("a", "b"), Input(1, 1, (0.0,) * 3, (1.0,) * 3), "resnet18")


def data(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(model.dump(CONTRACT))) | changes


@pytest.mark.parametrize(
    "contract",
    [replace(contract, schema=schema) for contract in (CONTRACT, SMALLEST) for schema in (1, 2, 3)] + [NEWEST],
)
def test_a_contract_that_is_saved_is_loaded_again(contract, tmp_path):
    model.save(contract, tmp_path / "contract.json")
    assert model.load(tmp_path / "contract.json") == contract
    assert model.parse(model.dump(contract)) == contract


def test_a_released_contract_of_schema_1_is_read_and_dumped_as_it_is():
    released = model.parse(json.loads(RELEASED.read_text(encoding="utf-8")))
    first = model.dump(replace(released, schema=1, evidence=None, explain=model.Explanation()))
    contract = model.parse(first)
    assert contract.schema == 1
    assert contract.accepted.figures.served is not None
    assert contract.accepted.figures.served.accuracy == first["accepted"]["engine_held_out_accuracy"]
    assert model.dump(contract) == first


def test_a_contract_of_schema_2_is_dumped_without_what_schema_3_brought():
    released = json.loads(RELEASED.read_text(encoding="utf-8"))
    assert model.dump(replace(model.parse(released), schema=2)).keys() == released.keys() - {"evidence"}
    second = json.dumps(model.dump(replace(NEWEST, schema=2)))
    figures = ("explanations", "random_heat", '"familiarity"', "engine_heatmap_correlation")
    new = ("evidence", "sharp_layer", '"forward"', *figures)
    assert not [name for name in new if name in second]
    assert model.parse(json.loads(second)).accepted.figures == FIRST.figures


def test_schema_1_takes_figures_that_this_release_does_not_know():
    first = model.dump(replace(CONTRACT, schema=1))
    first["accepted"]["of_an_experiment"] = 1
    assert model.parse(first) == replace(CONTRACT, schema=1)


def test_the_public_contract_says_nothing_of_where_the_model_was_made():
    public = CONTRACT.public()
    assert public.accepted == Accepted(THIRD.figures, run_id="a1")
    assert "cycles" not in json.dumps(model.dump(public))


def test_the_lineage_goes_from_the_model_to_its_first_ancestor():
    assert THIRD.lineage() == (THIRD, SECOND, FIRST)


@pytest.mark.parametrize("ancestor", [None, SECOND.ancestor])
def test_a_checkpoint_keeps_the_ancestor(ancestor):
    assert model.parse_ancestor(json.loads(json.dumps(model.dump_ancestor(ancestor)))) == ancestor


def test_an_ancestor_in_a_checkpoint_of_the_first_release_is_read():
    old = {"name": "cifar10", "version": "0", "accepted": {"validation_accuracy": 0.9, "run_id": "b"}}
    assert model.parse_ancestor(old) == Ancestor("cifar10", "0", Accepted(Figures(0.9), "b"))
    assert model.parse_ancestor({}) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 4}, "contract field schema is 4, expected 1 or 2 or 3"),
        ({"schema": 2, "evidence": {}}, "evidence is {}, expected no such field"),
        ({"schema": 1.0}, "schema is 1.0"),
        ({"schema": True}, "schema is True"),
        ({"name": "../x"}, "name is '../x', expected a text that matches"),
        ({"classes": ["cat"]}, "classes is ('cat',), expected two or more different names"),
        ({"classes": ["cat", "cat"]}, "expected two or more different names"),
        ({"classes": ["cat", 1]}, "classes[1] is 1, expected a text"),
        ({"input": None}, "input is None, expected a JSON object"),
        ({"input": {**data()["input"], "height": 0}}, "input.height is 0"),
        ({"input": {**data()["input"], "std": [1, 1, 0]}}, "input.std[2] is 0"),
        ({"input": {**data()["input"], "std": [1, 1]}}, "expected 3 numbers"),
        ({"input": {**data()["input"], "depth": 3}}, "input.depth is 3, expected no such field"),
        ({"engine": {"temperature": 0}}, "engine.temperature is 0"),
        ({"engine": {"temperature": float("nan")}}, "engine.temperature is nan, expected a number"),
        ({"engine": {"temperature": 10**400}}, "engine.temperature is 1000"),
        ({"accepted": {"run": "a"}}, "accepted.run is 'a', expected no such field"),
        ({"accepted": {"figures": {"engine_agreement": 2}}}, "accepted.figures.engine_agreement is 2"),
        ({"accepted": {"provenance": {"data_sha256": "x"}}}, "accepted.provenance.data_sha256 is 'x'"),
        ({"extra": 1}, "extra is 1, expected no such field"),
    ],
)
def test_what_cannot_be_used_is_refused_with_field_finding_and_remedy(changes, sentence):
    with pytest.raises(ContractError) as refusal:
        model.parse(data(**changes))
    assert sentence in str(refusal.value)
    assert "pack the model again" in str(refusal.value)


def test_a_figure_of_familiarity_is_a_share():
    text = json.loads(json.dumps(model.dump(NEWEST)))
    text["accepted"]["figures"]["familiarity"] = [["noise", 1.5]]
    with pytest.raises(ContractError, match=r"familiarity\[0\] is 1.5"):
        model.parse(text)


@pytest.mark.parametrize("content", ["", "no json", "[" * 100_000, "[]", "1", '{"schema":2}'])
def test_a_file_that_is_no_contract_is_refused(content, tmp_path):
    path = tmp_path / "contract.json"
    path.write_text(content)
    with pytest.raises(ContractError):
        model.load(path)


def test_ancestors_without_end_are_refused():
    accepted: dict[str, Any] = {}
    for _ in range(model.MAX_ANCESTORS + 2):
        accepted = {"ancestor": {"name": "m", "version": "1", "accepted": accepted}}
    with pytest.raises(ContractError, match="at most 50"):
        model.parse(data(accepted=accepted))
