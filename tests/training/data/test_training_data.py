from pathlib import Path

import torch

from training.data.device_augment import DeviceLoader
from training.data.images import divide, load_training_images
from training.data.training_data import load_training_data, make_loader
from training.parallel import ProcessGroup
from training.recipe import Augmentation, Recipe

SAMPLES = Path(__file__).parents[2] / "samples"
RECIPE = Recipe(data=f"imagefolder:{SAMPLES}", batch_size=16, workers=0)


def test_data_is_the_recipes_and_is_divided_as_it_says(tmp_path):
    data = load_training_data(RECIPE, tmp_path)
    images, size = load_training_images(RECIPE.data, tmp_path)
    training, held_out = divide(images, subset=0, validation=0.2, seed=0)
    assert (data.training.sha256(), data.held_out.sha256()) == (training.sha256(), held_out.sha256())
    assert (data.sha256, data.input, data.classes) == (images.sha256(), size, images.classes)


def test_processes_share_each_batch_equally(tiny_data):
    for rank in (0, 1):
        group = ProcessGroup(rank, 2, torch.device("cpu"))
        loader, batches = make_loader(tiny_data, Augmentation(0, 0), RECIPE, group)
        assert [len(images) for images, _ in loader] == [8, 8, 8]
        assert len(batches) == 3


def test_pixmix_takes_the_loader_that_knows_it_on_a_processor_too(tiny_data, monkeypatch):
    monkeypatch.setattr("training.data.device_augment._FRACTALS", 1)
    group = ProcessGroup(0, 1, torch.device("cpu"))
    loader, batches = make_loader(tiny_data, Augmentation(1, 5, pixmix=0.5), RECIPE, group)
    assert isinstance(loader, DeviceLoader)
    assert len(loader) == len(batches) == 3
