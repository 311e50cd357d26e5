import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from contracts.evidence import HeatmapFigures
from training.errors import HeatmapsAlike
from training.evaluate.heatmaps.choice import (
    AT_LEAST,
    AT_MOST,
    CANDIDATES,
    MAX_ALIKE,
    MAX_RANDOMISED,
    best_of,
    check_classes_differ,
    choose_explanation,
    figures_of,
    is_admitted,
    measure_explanation,
    possible,
)
from training.evaluate.heatmaps.faithfulness import STEPS

SIDE = 16
TWO = (("gradcam", "layer3", None), ("contrastcam", "layer4", "layer3"))
GOOD = HeatmapFigures(**AT_LEAST, **AT_MOST, randomised=(("fc", 0.1), ("layer4", MAX_RANDOMISED)))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).random((6, 3, SIDE, SIDE)).astype(np.float32)


@pytest.mark.parametrize("name", [*AT_LEAST, *AT_MOST, "randomised"])
def test_each_threshold_refuses_alone_and_what_was_not_measured_does_not(name):
    assert is_admitted(GOOD)
    if name == "randomised":
        assert not is_admitted(replace(GOOD, randomised=(("fc", 0.1), ("layer4", MAX_RANDOMISED + 0.01))))
        assert is_admitted(replace(GOOD, randomised=()))
        return
    worse = AT_LEAST[name] - 0.01 if name in AT_LEAST else AT_MOST[name] + 0.01
    assert not is_admitted(replace(GOOD, **{name: worse}))
    assert is_admitted(replace(GOOD, **{name: None}))


def row(
    *,
    admitted: bool,
    score: float,
    quarter: float | None = 0.5,
    alike: float = 0.0,
    road: float = 0.0,
    method: str = "cam",
) -> dict:
    figures = {"score": score, "quarter": quarter, "half": 0.5, "class_correlation": alike, "road": road}
    return {"method": method, "admitted": admitted} | figures


def test_the_most_faithful_of_the_admitted_is_chosen_however_faithful_the_others():
    faithful, admitted, by_road = (
        row(admitted=False, score=0.9),
        row(admitted=True, score=0.3),
        row(admitted=True, score=0.2, road=0.2),
    )
    assert best_of([faithful, admitted]) == admitted
    assert best_of([faithful, admitted, by_road]) == by_road


def test_without_an_admitted_one_the_best_pointing_is_chosen_of_those_that_depend_on_the_class():
    alike, faithful, pointing = (
        row(admitted=False, score=0.9, quarter=0.9, alike=MAX_ALIKE + 0.01),
        row(admitted=False, score=0.8, quarter=0.3),
        row(admitted=False, score=0.1, quarter=0.6),
    )
    assert best_of([alike, faithful, pointing]) == pointing
    assert best_of([alike, row(admitted=False, score=1, alike=0.99)]) == alike
    assert best_of([row(admitted=False, score=1, quarter=None)])["score"] == 1


@pytest.mark.parametrize("admitted", [True, False])
def test_a_method_with_a_backward_pass_is_chosen_only_if_none_of_the_forward_pass_can_be(admitted):
    backward = row(admitted=True, score=0.9, quarter=0.9, method="gradcam")
    forward = row(admitted=admitted, score=0.2)
    assert best_of([backward, forward]) == (forward if admitted else backward)
    neither = row(admitted=False, score=0.9, quarter=0.9, method="gradcam")
    alike = row(admitted=False, score=0.2, alike=MAX_ALIKE + 0.01)
    assert best_of([neither, row(admitted=False, score=0.2)])["method"] == "cam"
    assert best_of([neither, alike]) == neither


def test_a_network_that_sees_all_classes_alike_is_refused_with_the_figure_and_the_remedy(
    network, contract, engine, noise
):
    scores = np.tile(np.float32([0.7, 0.3]), (6, 1))
    opposed, blind = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad():
        opposed.fc.weight[1] = -opposed.fc.weight[0]
        blind.fc.weight[1] = blind.fc.weight[0]
    cam = replace(contract.explain, method="cam")
    assert check_classes_differ(opposed, cam, noise, scores) <= 0
    with pytest.raises(HeatmapsAlike, match=r"rank correlation of 1\.00 on 6 held-out images.*--explain-images"):
        check_classes_differ(blind, cam, noise, scores)
    labels = np.zeros(6, np.intp)
    with pytest.raises(HeatmapsAlike, match="train longer"):
        choose_explanation(blind, contract, engine, noise, labels, among=TWO[1:])


def test_choice_measures_every_candidate_and_gives_the_contracts_figures(network, contract, engine, noise):
    noise[:3, :, :8, :8] += 0.5  # three images are answered as squares
    labels = np.array([0, 0, 0, 1, 1, 1])
    choice, report = choose_explanation(network, contract, engine, noise, labels, among=TWO, max_alike=1)
    rows = report["candidates"]
    assert {(row["method"], row["layer"], row["sharp_layer"]) for row in rows} == set(TWO)
    best = best_of(rows, max_alike=1)
    assert (choice.method, choice.layer) == (best["method"], best["layer"])
    assert choice.sharp_layer == "layer3"  # the contract's, if the chosen method needs none
    assert set(choice.methods) == {choice.method, *contract.explain.methods}
    assert report["absent"] == {"quarter": report["absent"]["quarter"]}
    assert "4 classes" in report["absent"]["quarter"]
    chosen, random = figures_of(report)
    assert chosen.quarter is None
    assert chosen.insertion == best["insertion"]
    assert random.half == pytest.approx(0.5, abs=0.05)
    assert abs(random.class_correlation) < 0.1


def test_a_network_without_class_maps_has_the_candidates_that_need_none(network):
    other = copy.deepcopy(network)
    assert possible(network) == [*CANDIDATES]
    other.fc = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    assert {method for method, *_ in possible(other)} == {"gradcam", "gradcam++", "layercam"}


def test_the_heatmap_of_an_equal_image_is_no_stranger(network, contract, engine, images):
    report = measure_explanation(network, contract, engine, images, np.zeros(4, np.intp))
    assert (report["layer"], report["method"]) == ("layer4", "contrastcam")
    assert report["stranger"]["score"] == pytest.approx(report["score"], abs=0.05)
    assert report["stranger_similarity"] == pytest.approx(1, abs=0.01)
    assert report["random"]["deletion"] == pytest.approx(np.linspace(1, 0, STEPS + 1), abs=0.1)
    assert len(report["curves"]["insertion"]) == STEPS + 1
