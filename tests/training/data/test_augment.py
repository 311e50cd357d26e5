import numpy as np
import pytest
import torch

from training.data.augment import AugmentedImages, EpochBatches, training_loader
from training.data.images import CIFAR10_INPUT, Images
from training.recipe import Augmentation

IMAGES = Images(
    np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64) % 10, tuple("abcdefghij")
)


def batches_of(workers: int, epoch: int = 0, augmentation: Augmentation | None = None) -> list[torch.Tensor]:
    loader, batches = training_loader(
        IMAGES, CIFAR10_INPUT, augmentation or Augmentation(erasing=0.5), batch_size=16, workers=workers, seed=0
    )
    batches.epoch = epoch
    return [images for images, _ in loader]


def test_augmentation_does_not_depend_on_the_number_of_workers():
    for alone, shared in zip(batches_of(0), batches_of(2), strict=True):
        torch.testing.assert_close(alone, shared, rtol=0, atol=0)


def test_another_epoch_is_augmented_differently():
    assert not torch.equal(batches_of(0, epoch=0)[0], batches_of(0, epoch=1)[0])


def test_augmenting_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    batches_of(0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_images_are_erased_as_often_as_asked():
    def varied(erasing: float) -> torch.Tensor:
        dataset = AugmentedImages(IMAGES, CIFAR10_INPUT, Augmentation(0, erasing=erasing), seed=0)
        return dataset.__getitems__([(0, index) for index in range(64)])[0]

    erased = (varied(0.5) != varied(0.0)).flatten(1).any(1)
    assert 20 < erased.sum() < 44


def of_one_colour(labels: np.ndarray) -> Images:
    """Images that shifts and flips leave alone: all pixels of one are 20 times its label."""
    pixels = np.broadcast_to((20 * labels)[:, None, None, None], (len(labels), 32, 32, 3))
    return Images(pixels.astype(np.uint8), labels, IMAGES.classes)


def test_mixed_images_have_of_each_class_the_share_that_their_label_says():
    images = of_one_colour(IMAGES.labels)
    loader, _ = training_loader(images, CIFAR10_INPUT, Augmentation(0, cutmix=1.0), batch_size=64, workers=0, seed=0)
    pixels, labels = next(iter(loader))
    classes = (pixels[:, 0] * CIFAR10_INPUT.std[0] + CIFAR10_INPUT.mean[0]).mul(255 / 20).round().long()
    shares = torch.stack([(classes == label).float().mean((1, 2)) for label in range(10)], dim=1)
    torch.testing.assert_close(labels, shares)
    assert len(labels[labels > 0]) > 64


def test_batches_are_mixed_as_often_as_asked_and_the_same_ones_whoever_makes_them():
    augmentation = Augmentation(0, cutmix=0.5)
    mixed = []
    for workers in (0, 2):
        loader, _ = training_loader(IMAGES, CIFAR10_INPUT, augmentation, batch_size=2, workers=workers, seed=0)
        mixed.append([labels.ndim == 2 for _, labels in loader])
    assert mixed[0] == mixed[1]
    assert 8 < sum(mixed[0]) < 24
    for alone, shared in zip(batches_of(0, 0, augmentation), batches_of(2, 0, augmentation), strict=True):
        assert torch.equal(alone, shared)


def test_every_image_is_flipped_in_every_second_epoch():
    """Seen on images whose left half is black: a shift of 4 pixels cannot move that to the right."""
    half = np.zeros((64, 32, 32, 3), np.uint8)
    half[:, :, 16:] = 255
    dataset = AugmentedImages(Images(half, IMAGES.labels, IMAGES.classes), CIFAR10_INPUT, Augmentation(0), seed=0)
    right_is_bright = []
    for epoch in range(4):
        images, _ = dataset.__getitems__([(epoch, index) for index in range(64)])
        right_is_bright.append((images[:, :, :, 24:].mean((1, 2, 3)) > images[:, :, :, :8].mean((1, 2, 3))).numpy())
    np.testing.assert_array_equal(right_is_bright[0], ~right_is_bright[1])
    np.testing.assert_array_equal(right_is_bright[0], right_is_bright[2])
    assert 16 < right_is_bright[0].sum() < 48


@pytest.mark.parametrize("size", [32, 48])
def test_epoch_visits_each_image_once_and_drops_an_incomplete_batch(size):
    batches = EpochBatches(70, size, seed=0)
    seen = [index for batch in batches for _, index in batch]
    assert len(set(seen)) == len(seen) == 70 // size * size
    assert len(batches) == 70 // size


def test_processes_share_each_batch_and_see_the_images_that_one_would_see():
    shares = []
    for rank in range(2):
        loader, _ = training_loader(
            IMAGES, CIFAR10_INPUT, Augmentation(erasing=0.5), batch_size=16, workers=0, seed=0, rank=rank, processes=2
        )
        shares.append([images for images, _ in loader])
    for whole, first, second in zip(batches_of(0), *shares, strict=True):
        assert torch.equal(whole[0::2], first)
        assert torch.equal(whole[1::2], second)


def test_batch_larger_than_the_data_is_the_data():
    assert len(next(iter(EpochBatches(7, 128, seed=0)))) == 7
