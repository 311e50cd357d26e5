import torch

from training.data.fractals import draw_fractals

CPU = torch.device("cpu")


def test_fractals_are_colourful_different_and_the_same_for_one_seed():
    fractals = draw_fractals(3, 24, 0, CPU)
    assert (fractals.shape, fractals.dtype) == ((3, 3, 24, 24), torch.uint8)
    assert torch.equal(fractals, draw_fractals(3, 24, 0, CPU))
    assert (fractals.float().flatten(1).std(1) > 10).all()
    assert not torch.equal(fractals[0], fractals[1])


def test_another_seed_draws_other_fractals():
    assert not torch.equal(draw_fractals(1, 16, 0, CPU), draw_fractals(1, 16, 1, CPU))
