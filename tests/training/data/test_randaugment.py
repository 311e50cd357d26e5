import numpy as np
import pytest
import torch
from PIL import Image

from training.data.randaugment import ArrayRandAugment

# After training.data.randaugment, which makes torchvision importable beside a CPU-only torch.
from torchvision.transforms import RandAugment  # isort: skip

FILL = [125, 123, 114]
NOISE = np.random.default_rng(0).integers(0, 256, (120, 24, 32, 3), np.uint8)
IMAGES = {
    "noise": NOISE,
    "dull": NOISE // 4 + 90,
    "few values": NOISE // 100 * 40,
    "one colour": np.broadcast_to(NOISE[:, :1, :1], NOISE.shape),
    "flipped": NOISE[:, :, ::-1],
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize(("operations", "magnitude"), [(1, 5), (2, 9), (3, 30), (2, 0)])
def test_images_are_those_of_torchvision(images, operations, magnitude):
    own = ArrayRandAugment(operations, magnitude, size=(24, 32), fill=FILL)
    theirs = RandAugment(operations, magnitude, fill=FILL)
    drawn, expected = [], []
    for seed, pixels in enumerate(images):
        torch.manual_seed(seed)
        drawn.append(own.draw())
        torch.manual_seed(seed)
        expected.append(np.asarray(theirs(Image.fromarray(np.ascontiguousarray(pixels)))))
    varied = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    own.vary(varied, drawn)
    np.testing.assert_array_equal(varied.transpose(0, 2, 3, 1), expected)
