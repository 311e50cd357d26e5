"""Convolution by patches against torch's own."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from handlers.network import build_network
from training.convolution import PatchConvolution, use_patches


@pytest.mark.parametrize("shape", [(4, 4, 1), (2, 2, 1), (1, 1, 1), (8, 8, 2), (7, 7, 2), (3, 4, 1), (5, 8, 2)])
def test_patches_give_the_answers_and_gradients_of_a_convolution(shape):
    height, width, stride = shape
    torch.manual_seed(0)
    patches = PatchConvolution.of(nn.Conv2d(24, 32, 3, stride=stride, padding=1, bias=False))
    images = torch.randn(6, 24, height, width).bfloat16().requires_grad_()
    answer = patches(images)
    gradient = torch.randn_like(answer)
    answer.backward(gradient)

    exact = images.detach().double().requires_grad_()
    weight = patches.weight.detach().bfloat16().double().requires_grad_()
    wanted = conv2d(exact, weight, stride=stride, padding=1)
    wanted.backward(gradient.double())
    for got, want in ((answer, wanted), (images.grad, exact.grad), (patches.weight.grad, weight.grad)):
        assert got.shape == want.shape
        assert (got - want).abs().max() < 0.01 * want.abs().max()  # bfloat16 has 8 bits


@pytest.mark.parametrize("images", [torch.randn(2, 8, 9, 9).bfloat16(), torch.randn(2, 8, 4, 4)])
def test_wide_maps_and_full_precision_are_convolved_as_ever(images):
    patches = PatchConvolution.of(nn.Conv2d(8, 8, 3, padding=1, bias=False)).to(images.dtype)
    assert torch.equal(patches(images), conv2d(images, patches.weight, padding=1))


def test_network_keeps_its_parameters_and_only_its_3x3_convolutions_change():
    network = build_network("resnet18_small", 10)
    before = dict(network.named_parameters())
    use_patches(network)
    after = dict(network.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    kinds = {module.kernel_size: type(module) for module in network.modules() if isinstance(module, nn.Conv2d)}
    assert kinds == {(3, 3): PatchConvolution, (1, 1): nn.Conv2d}


def test_frozen_weights_get_no_gradient():
    patches = PatchConvolution.of(nn.Conv2d(8, 8, 3, padding=1, bias=False))
    patches.weight.requires_grad_(False)
    images = torch.randn(2, 8, 4, 4).bfloat16().requires_grad_()
    patches(images).sum().backward()
    assert patches.weight.grad is None
    assert images.grad is not None
