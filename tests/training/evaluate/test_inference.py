import numpy as np
import torch
from torch import nn

from contracts.model import Input
from handlers.engines import Outputs
from handlers.preprocess import normalise
from training.evaluate.inference import predict_logits, run_engine

SIZE = Input(4, 4, (0.5,) * 3, (0.25,) * 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 3), dtype=np.uint8)


def test_logits_of_many_images_are_the_networks_in_order_without_its_dropout():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Dropout(0.5)).train()
    logits = predict_logits(network, IMAGES, SIZE, batch_size=128)
    expected = network[1](torch.from_numpy(normalise(IMAGES, SIZE)).flatten(1))
    torch.testing.assert_close(logits, expected.detach(), atol=1e-5, rtol=1e-4)
    assert not network.training
    assert not logits.requires_grad


class Mean:
    """Answers with an image's mean, and gives it as the only feature, if it gives features."""

    def __init__(self, *, gives_features: bool):
        self._gives_features = gives_features

    def run(self, images):
        mean = images.mean((1, 2, 3))[:, None]
        return Outputs(np.concatenate([mean, 1 - mean], axis=1), mean if self._gives_features else None)


def test_an_engine_answers_all_images_in_order():
    probabilities, features = run_engine(Mean(gives_features=True), IMAGES, SIZE)
    np.testing.assert_allclose(features[:, 0], normalise(IMAGES, SIZE).mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_array_equal(probabilities[:, 0], features[:, 0])


def test_an_engine_without_features_gives_none():
    probabilities, features = run_engine(Mean(gives_features=False), IMAGES, SIZE)
    assert (len(probabilities), features) == (300, None)
