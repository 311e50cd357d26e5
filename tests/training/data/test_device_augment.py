from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import device_augment
from training.data.augment import EpochBatches
from training.data.device_augment import DeviceLoader, randaugment_operations
from training.data.images import CIFAR10_INPUT, Images

# After training.data.device_augment, which makes torchvision importable beside a CPU-only torch.
from torchvision.transforms import InterpolationMode, RandAugment  # isort: skip
from torchvision.transforms.autoaugment import _apply_op  # isort: skip
from training.recipe import Augmentation

CPU = torch.device("cpu")
IMAGES = Images(
    np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64) % 10, tuple("abcdefghij")
)
PLAIN = Augmentation(operations=0)


@pytest.fixture(autouse=True)
def _few_fractals(monkeypatch):
    monkeypatch.setattr(device_augment, "_FRACTALS", 4)


def loader_of(augmentation: Augmentation, epoch: int = 0, images: Images = IMAGES, views: int = 1) -> DeviceLoader:
    batches = EpochBatches(len(images), 16, seed=0)
    batches.epoch = epoch
    return DeviceLoader(images, CIFAR10_INPUT, augmentation, batches, seed=0, device=CPU, views=views)


def pixels_of(loader: DeviceLoader) -> torch.Tensor:
    """All images of the epoch, 0..255."""
    images = torch.cat([images for images, _ in loader])
    return 255 * (
        images * torch.tensor(CIFAR10_INPUT.std).view(3, 1, 1) + torch.tensor(CIFAR10_INPUT.mean).view(3, 1, 1)
    )


def test_an_epoch_is_the_same_again_and_another_one_is_not():
    everything = Augmentation(erasing=0.5, cutmix=0.5, pixmix=0.5)
    one, again, other = (list(loader_of(everything, epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(*pair) for batches in zip(one, again, strict=True) for pair in zip(*batches, strict=True))
    assert not torch.equal(one[0][0], other[0][0])


def test_images_do_not_depend_on_which_are_augmented_together(monkeypatch):
    together = list(loader_of(Augmentation(pixmix=0.5)))
    monkeypatch.setattr(device_augment, "_BLOCK_PIXELS", 1)
    for one, other in zip(together, loader_of(Augmentation(pixmix=0.5)), strict=True):
        torch.testing.assert_close(one, other)


def test_without_other_operations_an_image_is_a_cut_out_of_its_mirrored_borders():
    loader = loader_of(PLAIN)
    order = np.concatenate(list(loader.batches.indices()))
    padded = np.pad(IMAGES.images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    for index, image in zip(order, pixels_of(loader).round().byte().numpy().transpose(0, 2, 3, 1), strict=True):
        cut_outs = (
            cut
            for down in range(9)
            for right in range(9)
            for cut in (padded[index, down : down + 32, right : right + 32],)
        )
        assert any(np.array_equal(image, cut) or np.array_equal(image[:, ::-1], cut) for cut in cut_outs)


def test_images_are_flipped_in_every_second_epoch():
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (64, 32, 32, 3))
    images = replace(IMAGES, images=np.ascontiguousarray(ramp))
    flips = []
    for epoch in range(3):
        loader = loader_of(PLAIN, epoch, images)
        rises = (pixels_of(loader)[:, 0, 0, 14] < pixels_of(loader)[:, 0, 0, 18]).numpy()
        flips.append(rises[np.argsort(np.concatenate(list(loader.batches.indices())))])
    assert all(np.array_equal(one, ~other) for one, other in pairwise(flips))
    assert 20 < flips[0].sum() < 44


@pytest.mark.parametrize("mode", [InterpolationMode.NEAREST, InterpolationMode.BILINEAR])
def test_operations_are_those_that_augment_on_processors(mode):
    """Rounding may differ, and so may the source of a pixel that lies between two."""
    fill = [round(255 * mean) for mean in CIFAR10_INPUT.mean]
    images = (
        np.clip(np.random.default_rng(0).normal(128, 40, (8, 3, 4, 4)), 0, 255)
        .repeat(8, 2)
        .repeat(8, 3)
        .astype(np.uint8)
    )
    wanted = []
    for name, (magnitudes, signed) in RandAugment()._augmentation_space(31, (32, 32)).items():
        magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
        for sign in (1, -1) if signed else (1, 1):
            varied = [
                np.asarray(
                    _apply_op(
                        Image.fromarray(image.transpose(1, 2, 0)),
                        name,
                        sign * magnitude,
                        interpolation=mode,
                        fill=fill,
                    )
                ).transpose(2, 0, 1)
                for image in images
            ]
            wanted.append((name, np.stack(varied)))
    is_bilinear = mode is InterpolationMode.BILINEAR
    operations = randaugment_operations(9, (32, 32), [float(value) for value in fill], bilinear=is_bilinear)
    for (name, varied), operation in zip(wanted, operations, strict=True):
        difference = np.abs(operation(torch.from_numpy(images)).numpy().astype(int) - varied)
        assert np.mean(difference <= 2) > 0.93, name


def test_images_are_erased_as_often_as_asked():
    erased = (pixels_of(loader_of(replace(PLAIN, erasing=0.5))) - pixels_of(loader_of(PLAIN))).abs().flatten(1).amax(
        1
    ) > 1
    assert 20 < erased.sum() < 44


def test_mixed_batches_have_shares_of_labels():
    for images, labels in loader_of(replace(PLAIN, cutmix=1.0)):
        assert images.shape == (16, 3, 32, 32)
        assert labels.shape == (16, 10)
        torch.testing.assert_close(labels.sum(1), torch.ones(16))


def test_pixmix_changes_as_many_images_as_asked_and_stays_in_their_range():
    mixed, plain = pixels_of(loader_of(replace(PLAIN, pixmix=0.5))), pixels_of(loader_of(PLAIN))
    assert mixed.min() > -0.01
    assert mixed.max() < 255.01
    # A fifth of those that are chosen get no mixing.
    assert 13 < ((mixed - plain).abs().flatten(1).amax(1) > 1).sum() < 38


def test_views_of_an_image_are_a_plain_one_and_two_that_are_augmented_differently():
    batches = loader_of(Augmentation(operations=2, magnitude=15, pixmix=0.5), views=3)
    plain, one, other = torch.cat([images for images, _ in batches]).unflatten(1, (3, 3)).unbind(1)
    order = np.concatenate(list(batches.batches.indices()))
    for index, shown in zip(order, plain, strict=True):
        pixels = shown * torch.tensor(CIFAR10_INPUT.std).view(3, 1, 1) + torch.tensor(CIFAR10_INPUT.mean).view(3, 1, 1)
        values = {tuple(colour) for colour in IMAGES.images[index].reshape(-1, 3).tolist()}
        assert {tuple(colour) for colour in (255 * pixels).round().int().flatten(1).T.tolist()} <= values
    changed = [((view - plain).abs().flatten(1).amax(1) > 0.05).float().mean() for view in (one, other)]
    assert min(changed) > 0.5
    assert ((one - other).abs().flatten(1).amax(1) > 0.05).float().mean() > 0.5


def test_views_are_shifted_flipped_and_joined_alike():
    for images, labels in loader_of(replace(PLAIN, cutmix=1.0), views=3):
        plain, one, other = images.unflatten(1, (3, 3)).unbind(1)
        assert torch.equal(plain, one)
        assert torch.equal(plain, other)
        assert labels.shape == (16, 10)
