import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from contracts.model import Contract, Explanation, Input
from handlers.network import build_network
from training.errors import HeatmapsAlike
from training.evaluate.explanations import (
    LAYERS,
    MAX_ALIKE,
    MAX_SIMILARITY,
    STEPS,
    Probe,
    best_of,
    check_classes_differ,
    choose_explanation,
    measure_explanation,
    randomised,
    rank_correlation,
)

SIDE = 16
CONTRACT = Contract(
    "toy",
    "0",
    ("square", "nothing"),
    Input(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3),
    "resnet18_small",
    Explanation(methods=("gradcam", "eigencam")),
)


class SquareEngine:
    """As sure of `square` as the image's upper left quarter is bright."""

    def predict(self, images: np.ndarray) -> np.ndarray:
        square = images[:, :, : SIDE // 2, : SIDE // 2].mean((1, 2, 3))
        return np.stack([square, 1 - square], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    images = np.zeros((4, 3, SIDE, SIDE), np.float32)
    images[:, :, : SIDE // 2, : SIDE // 2] = 1
    return images


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(1)  # not the seed of the random weights that it is compared with
    return build_network("resnet18_small", 2).eval()


def test_a_heatmap_of_what_decides_has_the_curves_counted_by_hand(images):
    """A quarter of the pixels decides: after one of eight steps half of it is gone, after two all."""
    faithful = Probe(SquareEngine(), images).measure(images[:, 0])
    assert faithful.deletion == pytest.approx([1, 0.5] + [0] * (STEPS - 1))
    assert faithful.deletion_area == pytest.approx((1 / 2 + 1 / 2) / STEPS)
    assert faithful.insertion[2:] == pytest.approx([1] * (STEPS - 1))
    assert faithful.score == faithful.insertion_area - faithful.deletion_area


def test_random_order_lies_between_a_heatmap_and_its_contrary(images):
    probe = Probe(SquareEngine(), images)
    right, random, wrong = (result.score for result in (
        probe.measure(images[:, 0]), probe.measure_random(), probe.measure(-images[:, 0])
    ))  # fmt: skip
    assert right > random + 0.2
    assert random > wrong + 0.2
    assert probe.measure_random().deletion == pytest.approx(np.linspace(1, 0, STEPS + 1), abs=0.1)


def test_rank_correlation_is_spearmans():
    first, second = np.random.default_rng(0).random((2, 3, 5, 5)).astype(np.float32)
    first[0] = np.round(first[0], 1)  # with ties
    expected = [spearmanr(one.ravel(), other.ravel()).statistic for one, other in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlation(first, second), expected)


def test_an_even_heatmap_is_like_no_other():
    assert rank_correlation(np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=np.float32)[None]).tolist() == [0]


def test_weights_become_random_from_the_head_down_and_the_network_keeps_its_own(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    changed = []
    for name, scrambled in randomised(network, CONTRACT):
        state = scrambled.state_dict()
        layers = {key.split(".")[0] for key, value in state.items() if not torch.equal(value, before[key])}
        changed.append((name, layers))
    assert changed[0] == ("fc", {"fc"})
    assert changed[1] == ("layer4", {"fc", "layer4"})
    assert changed[-1][1] >= {"fc", "layer4", "layer3", "layer2", "layer1", "conv1"}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_neither_a_blind_method_nor_one_that_ignores_the_weights_is_chosen():
    def row(method: str, score: float, similarity: float) -> dict:
        return {"method": method, "score": score, "similarity": similarity, "class_similarity": 0.0}

    blind, unsound, sound, worse = (
        row("eigencam", 0.9, 0.0),
        row("layercam", 0.8, MAX_SIMILARITY + 0.01),
        row("gradcam", 0.7, 0.1),
        row("gradcam++", 0.6, 0.1),
    )
    assert best_of([worse, blind, unsound, sound]) == sound
    assert best_of([unsound, blind]) == unsound


def test_heatmaps_that_are_the_same_for_every_class_are_not_chosen_however_faithful():
    def row(score: float, class_similarity: float) -> dict:
        return {"method": "gradcam", "score": score, "similarity": 0.0, "class_similarity": class_similarity}

    alike, more_alike, about = row(0.8, MAX_ALIKE + 0.01), row(0.9, 0.99), row(0.6, MAX_ALIKE)
    assert best_of([alike, more_alike, about]) == about
    assert best_of([more_alike, alike]) == alike  # which choose_explanation refuses


def test_a_network_that_sees_all_classes_alike_is_refused_with_the_figure_and_the_remedy(network):
    scores = np.tile(np.float32([0.7, 0.3]), (4, 1))
    images = np.random.default_rng(0).random((4, 3, SIDE, SIDE)).astype(np.float32)
    opposed, blind = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad():
        opposed.fc.weight[1] = -opposed.fc.weight[0]
        blind.fc.weight[1] = blind.fc.weight[0]
    assert check_classes_differ(opposed, CONTRACT.explain, images, scores) <= 0
    with pytest.raises(HeatmapsAlike, match=r"rank correlation of 1\.00 on 4 held-out images.*--explain-images"):
        check_classes_differ(blind, CONTRACT.explain, images, scores)
    with pytest.raises(HeatmapsAlike, match="train longer"):
        choose_explanation(blind, CONTRACT, SquareEngine(), images)
    assert choose_explanation(blind, CONTRACT, SquareEngine(), images, max_alike=1)[1]["candidates"]


def test_choice_is_the_best_of_the_candidates_and_keeps_the_methods(network):
    images = np.random.default_rng(0).random((6, 3, SIDE, SIDE)).astype(np.float32)
    choice, report = choose_explanation(network, CONTRACT, SquareEngine(), images, max_alike=1)
    assert {(row["layer"], row["method"]) for row in report["candidates"]} == {
        *((layer, "gradcam") for layer in LAYERS),
        ("layer4", "eigencam"),
    }
    best = best_of(report["candidates"], max_alike=1)
    assert (choice.layer, choice.method) == (best["layer"], best["method"])
    assert choice.methods == CONTRACT.explain.methods


def test_the_heatmap_of_an_equal_image_is_no_stranger(network, images):
    report = measure_explanation(network, CONTRACT, SquareEngine(), images)
    assert (report["layer"], report["method"]) == (CONTRACT.explain.layer, CONTRACT.explain.method)
    assert report["stranger"]["score"] == pytest.approx(report["score"], abs=0.05)
    assert report["stranger_similarity"] == pytest.approx(1, abs=0.01)
    assert report["random"]["deletion"] == pytest.approx(np.linspace(1, 0, STEPS + 1), abs=0.1)
