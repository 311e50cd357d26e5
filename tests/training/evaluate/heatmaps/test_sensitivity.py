import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from handlers.network import build_network
from training.evaluate.heatmaps.passes import by
from training.evaluate.heatmaps.sensitivity import HEADS, randomise, randomised_correlations, rank_correlation


def test_rank_correlation_is_spearmans():
    first, second = np.random.default_rng(0).random((2, 3, 5, 5)).astype(np.float32)
    first[0] = np.round(first[0], 1)  # with ties
    expected = [spearmanr(one.ravel(), other.ravel()).statistic for one, other in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlation(first, second), expected)


def test_an_even_heatmap_is_like_no_other():
    assert rank_correlation(np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=np.float32)[None]).tolist() == [0]


@pytest.fixture(scope="module")
def random(network, contract):
    return randomise(network, contract)


def test_weights_become_random_from_the_head_down_and_the_network_keeps_its_own(network, contract):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = randomise(network, contract)

    def changed(other: torch.nn.Module) -> set[str]:
        state = other.state_dict()
        return {key.split(".")[0] for key, value in state.items() if not torch.equal(value, before[key])}

    assert all(changed(head) == {"fc"} for head in random.heads)
    assert [name for name, _ in random.cumulative] == ["layer4", "layer3", "layer2", "layer1", "bn1", "conv1"]
    assert changed(random.cumulative[0][1]) == {"fc", "layer4"}
    assert changed(random.cumulative[-1][1]) >= {"fc", "layer4", "layer3", "layer2", "layer1", "conv1"}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_random_heads_are_several_and_none_is_what_a_training_began_with(random, contract):
    """What a network has learnt still fits the weights that it began with: they are not random to it."""
    heads = [head.fc.weight for head in random.heads]
    assert len(heads) == HEADS
    assert not torch.equal(heads[0], heads[1])
    for seed in range(2):
        torch.manual_seed(seed)
        begun = build_network(contract.architecture, 2).fc.weight
        assert not any(torch.equal(head, begun) for head in heads)


def test_heat_of_the_image_alone_is_alike_for_all_weights(network, contract, random, images):
    """A method that shows the image's brightness fails the test of random weights, at every layer."""
    images = images + np.random.default_rng(0).random(images.shape, dtype=np.float32)
    targets = np.zeros(len(images), np.intp)
    head, blind = randomised_correlations(network, random, lambda net, images, _: images[:, 0], images, targets)
    assert [head, *blind.values()] == pytest.approx([1] * 7)
    head, seeing = randomised_correlations(network, random, by(contract.explain), images, targets)
    assert max(head, *seeing.values()) < 0.95
