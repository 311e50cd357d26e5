import pytest
import torch
from torch import nn

from training.optimiser import AVERAGED_EVERY, AveragedNetwork, at_worst_weights, freeze, make_optimiser
from training.recipe import EVERYTHING, FULL_SIZE, Augmentation, Phase, Recipe

HEAD = Phase("top", 1, 0.1, ("2",), FULL_SIZE, Augmentation(), 0.0)
WHOLE = Phase("all", 1, 0.1, EVERYTHING, FULL_SIZE, Augmentation(), 0.0)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def test_what_a_phase_does_not_train_is_frozen_with_its_statistics(network):
    freeze(network, HEAD)
    assert {name for name, weight in network.named_parameters() if weight.requires_grad} == {"2.weight", "2.bias"}
    network(torch.randn(5, 3) + 9)
    assert network[1].running_mean.tolist() == [0.0] * 4


def test_only_matrices_of_the_phase_are_decayed(network):
    matrices, vectors = make_optimiser(network, HEAD, Recipe(weight_decay=0.1)).param_groups
    assert [id(weight) for weight in matrices["params"]] == [id(network[2].weight)]
    assert [id(weight) for weight in vectors["params"]] == [id(network[2].bias)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def test_without_momentum_there_is_no_nesterov(network):
    assert make_optimiser(network, WHOLE, Recipe()).defaults["nesterov"]
    assert not make_optimiser(network, WHOLE, Recipe(momentum=0.0)).defaults["nesterov"]


def test_weights_climb_by_the_radius_along_the_gradient_and_come_back(network):
    network.eval()
    network(torch.randn(5, 3)).square().sum().backward()
    before = flat(network)
    slope = torch.cat([weight.grad.flatten() for weight in network.parameters()])
    with at_worst_weights(network, 0.5):
        climbed = flat(network)
    torch.testing.assert_close(climbed - before, 0.5 * slope / slope.norm(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(flat(network), before)


def test_average_begins_as_the_network_and_then_follows_it_ever_slower(network):
    averaged = AveragedNetwork(network, 0.9)
    for number in range(12):
        before = averaged.module[0].weight.clone()
        with torch.no_grad():
            network[0].weight.add_(1.0)
        averaged.update_parameters(network)
        moved = ((averaged.module[0].weight - before) / (network[0].weight - before)).mean().item()
        steps = AVERAGED_EVERY * number
        decay = min(0.9, (1 + steps) / (10 + steps)) ** AVERAGED_EVERY if number else 0.0
        assert moved == pytest.approx(1 - decay, abs=1e-4)


def test_blend_is_a_mean_of_two_states_and_leaves_counters(network):
    averaged = AveragedNetwork(network, 0.9)
    other = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    averaged.module[1].num_batches_tracked += 3
    blended = averaged.blended(0.25, other)
    torch.testing.assert_close(blended["0.weight"], 0.75 * network[0].weight.detach())
    assert blended["1.num_batches_tracked"] == 3


def test_state_without_a_blend_is_a_copy(network):
    averaged = AveragedNetwork(network, 0.9)
    copied = averaged.blended(0.0, {})
    with torch.no_grad():
        averaged.module[0].weight.zero_()
    assert torch.equal(copied["0.weight"], network[0].weight)


def test_restart_forgets_what_was_averaged(network):
    averaged = AveragedNetwork(network, 0.9)
    averaged.update_parameters(network)
    averaged.restart()
    with torch.no_grad():
        network[0].weight.fill_(7.0)
    averaged.update_parameters(network)
    assert averaged.module[0].weight.unique().tolist() == [7.0]
