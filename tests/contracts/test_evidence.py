"""The contract's evidence settings and figures: what is dumped is read again, and each field is bounded."""

from __future__ import annotations

import json
from dataclasses import fields as fields_of
from typing import Any

import pytest

from contracts.evidence import (
    FAMILIARITY_METHODS,
    AnswerSet,
    Evidence,
    Familiar,
    HeatmapFigures,
    Similar,
    parse_evidence,
    parse_heatmap_figures,
)
from contracts.fields import Fields, as_json
from contracts.model import ContractError

WHOLE = Evidence(Familiar("knn", 10, 5000, 0.9), Similar(5000, True, 0.97), AnswerSet(5000), (("similar", "too few"),))
FIGURES = HeatmapFigures(0.96, 1.0, 0.92, 0.99, -0.4, 0.2, (("fc", 0.2), ("layer4", -0.1)), 0.8, 0.4, -0.3)


def fields(data: object) -> Fields:
    return Fields(json.loads(json.dumps(as_json(data))), "evidence", ContractError)


@pytest.mark.parametrize("evidence", [WHOLE, Evidence()])
def test_settings_that_are_dumped_are_read_again(evidence: Evidence) -> None:
    assert parse_evidence(fields(evidence)) == evidence


@pytest.mark.parametrize("figures", [FIGURES, HeatmapFigures()])
def test_figures_that_are_dumped_are_read_again(figures: HeatmapFigures) -> None:
    assert parse_heatmap_figures(fields(figures)) == figures


def test_a_contract_without_evidence_has_none() -> None:
    assert parse_evidence(None) is None
    assert parse_heatmap_figures(None) is None


@pytest.mark.parametrize("method", FAMILIARITY_METHODS)
def test_every_method_of_familiarity_is_read(method: str) -> None:
    read = parse_evidence(fields(Evidence(Familiar(method, 0, 1))))
    assert read is not None
    assert read.familiar == Familiar(method, 0, 1)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"familiar": {"method": "guess"}}, "evidence.familiar.method is 'guess', expected one of knn"),
        ({"familiar": as_json(WHOLE.familiar) | {"familiar_share": 1.1}}, "evidence.familiar.familiar_share is 1.1"),
        ({"familiar": as_json(WHOLE.familiar) | {"k": 3}}, "evidence.familiar.k is 3, expected no such field"),
        ({"similar": {"images": 0}}, "evidence.similar.images is 0"),
        ({"similar": {"images": 1, "thumbnails": 1}}, "evidence.similar.thumbnails is 1, expected true or false"),
        ({"answer_set": {}}, "evidence.answer_set.images is None"),
        ({"absent": [["similar"]]}, "evidence.absent[0] is ['similar'], expected a pair"),
        ({"absent": [["similar", 1]]}, "evidence.absent[0] is 1, expected a text"),
        ({"other": 1}, "evidence.other is 1, expected no such field"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_with_their_path(part: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ContractError) as refusal:
        parse_evidence(fields(part))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("name", [field.name for field in fields_of(HeatmapFigures) if field.name != "randomised"])
def test_every_figure_of_heatmaps_is_bounded(name: str) -> None:
    for value in (1.01, -1.01, "0.5"):
        with pytest.raises(ContractError, match=rf"evidence\.{name} is '?{value}"):
            parse_heatmap_figures(fields({name: value}))


def test_a_share_is_not_negative_and_a_correlation_may_be() -> None:
    with pytest.raises(ContractError, match=r"insertion is -0\.1, expected a number of at least 0"):
        parse_heatmap_figures(fields({"insertion": -0.1}))
    with pytest.raises(ContractError, match=r"randomised\[0\] is -1\.1"):
        parse_heatmap_figures(fields({"randomised": [["fc", -1.1]]}))
    assert parse_heatmap_figures(fields({"road": -0.1, "class_correlation": -1})) == HeatmapFigures(
        road=-0.1, class_correlation=-1
    )


def test_a_figure_of_another_release_is_refused() -> None:
    with pytest.raises(ContractError, match=r"evidence\.sharpness is 1, expected no such field"):
        parse_heatmap_figures(fields({"sharpness": 1}))
