import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from contracts.model import Accepted, Ancestor, Contract, Provenance
from contracts.model import save as save_contract
from handlers.network import build_network
from training.data.images import CIFAR10_CLASSES, CIFAR10_INPUT
from training.errors import TrainingError
from training.pretrained import check_split, located, pretrained_network
from training.recipe import Augmentation, Recipe
from training.train import train

# After handlers.network, which declares what torchvision's import needs.
from torchvision.models import ResNet18_Weights  # isort: skip

THESE, PETS = "a" * 64, "b" * 64  # SHA-256 of images
SAMPLES = Path(__file__).parents[1] / "samples"
RECIPE = Recipe(
    data=f"imagefolder:{SAMPLES}", pretrained="imagenet", head_epochs=1, epochs=1, batch_size=40, sizes=((0.0, 8),),
    precision="fp32", workers=0, augmentation=Augmentation(0),
)  # fmt: skip


@pytest.fixture
def hub(tmp_path) -> Iterator[Path]:
    """An empty cache of torch's hub."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub"
    torch.hub.set_dir(before)


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Of torchvision's keys and shapes, batch-norm statistics included."""
    torch.manual_seed(0)
    network = build_network("resnet18", 1000)
    network(torch.randn(2, 3, 64, 64))
    return network.state_dict()


@pytest.fixture
def served(tmp_path, state, monkeypatch) -> Iterator[Path]:
    """The folder of a server that torchvision's address leads to; file and address carry the content's hash."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(state, folder / "weights.pth")
    content = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    (folder / "weights.pth").rename(folder / f"resnet18-{content[:8]}.pth")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/resnet18-{content[:8]}.pth"
        monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", address)
        yield folder
        server.shutdown()
        thread.join()


def fetched(architecture: str = "resnet18_small") -> dict[str, torch.Tensor]:
    return pretrained_network(RECIPE, architecture, CIFAR10_CLASSES).state_dict()


def test_imagenet_weights_are_fetched_whole_but_for_the_head(served, hub, state):
    network = fetched("resnet18")
    assert network["fc.weight"].shape == (10, 512)
    for name, value in state.items():
        assert name.startswith("fc.") or torch.equal(network[name], value), name


def test_small_images_network_gets_the_centre_of_imagenets_stem(served, hub, state):
    network = fetched()
    assert torch.equal(network["conv1.weight"], state["conv1.weight"][:, :, 2:5, 2:5])
    for name, value in state.items():
        assert name.startswith(("fc.", "conv1.")) or torch.equal(network[name], value), name


def test_larger_images_network_gets_our_stem_in_the_middle_of_its_own(tmp_path):
    ours = build_network("resnet18_small", 10).state_dict()
    torch.save(ours, tmp_path / "best.pth")
    recipe = replace(RECIPE, pretrained=str(tmp_path / "best.pth"))
    stem = pretrained_network(recipe, "resnet18", CIFAR10_CLASSES).state_dict()["conv1.weight"]
    assert torch.equal(stem[:, :, 2:5, 2:5], ours["conv1.weight"])
    assert stem.count_nonzero() == ours["conv1.weight"].count_nonzero()


def test_transfer_from_imagenet_trains_the_head_and_the_top_only(served, hub, state, tmp_path, cache):
    folder = train(RECIPE, tmp_path / "run", cache, registers=False)
    trained = torch.load(folder / "last.pt", weights_only=True)["network"]
    layers = {name.split(".")[0] for name, value in trained.items() if not torch.equal(value, state[name])}
    assert layers == {"conv1", "layer3", "layer4", "fc"}  # conv1: the centre of theirs
    assert torch.equal(trained["conv1.weight"], state["conv1.weight"][:, :, 2:5, 2:5])


def test_imagenet_weights_are_kept_for_the_next_time(served, hub):
    first = fetched()
    next(served.iterdir()).unlink()
    assert torch.equal(fetched()["layer1.0.conv1.weight"], first["layer1.0.conv1.weight"])


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_damaged_or_missing_imagenet_weights_say_what_to_do(damage, served, hub):
    file = next(served.iterdir())
    if damage == "changed":
        file.write_bytes(file.read_bytes() + b"!")
    else:
        file.unlink()
    with pytest.raises(TrainingError, match=r"resnet18-.*pth into .*hub/checkpoints, or train with --pretrained none"):
        fetched()


def test_imagenet_weights_out_of_reach_say_what_to_do(hub, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(TrainingError, match=r"resnet18-.*pth into .*hub/checkpoints, or train with --pretrained none"):
        fetched()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    recipe = replace(RECIPE, pretrained=str(tmp_path / "other.pth"))
    with pytest.raises(TrainingError, match="no weights of resnet18_small"):
        pretrained_network(recipe, "resnet18_small", CIFAR10_CLASSES)


def test_grandparents_that_have_learnt_what_would_be_held_out_are_refused_too(tmp_path):
    grandparent = Accepted(
        recipe={"data": "cifar10", "subset": 0, "validation": 0.1, "seed": 3}, provenance=provenance(THESE)
    )
    parent = Accepted(recipe={"data": "imagefolder:pets"}, provenance=provenance(PETS))
    write_weights(tmp_path, replace(parent, ancestor=Ancestor("a", "1", grandparent)))
    recipe = Recipe(pretrained=str(tmp_path / "best.pth"), validation=0.1, seed=3)
    check_split(recipe, THESE)
    with pytest.raises(TrainingError, match=r"--validation 0\.1 --seed 3"):
        check_split(replace(recipe, seed=4), THESE)


def test_images_that_have_changed_since_the_weights_learnt_them_are_warned_of(tmp_path, caplog):
    write_weights(tmp_path, Accepted(recipe={"data": "imagefolder:pets"}, provenance=provenance(PETS)))
    recipe = Recipe(data="imagefolder:pets", pretrained=str(tmp_path / "best.pth"))
    check_split(recipe, THESE)
    assert "imagefolder:pets has changed" in caplog.text


def provenance(data_sha256: str) -> Provenance:
    return Provenance(data_sha256, training_images=8, held_out_images=2, epochs=1, duration_s=1, processes=1)


def write_weights(folder: Path, accepted: Accepted) -> None:
    """A model of ours that was accepted with this."""
    torch.save({}, folder / "best.pth")
    contract = Contract("pets", "1", CIFAR10_CLASSES, CIFAR10_INPUT, "resnet18_small", accepted=accepted)
    save_contract(contract, folder / "contract.json")


def test_weights_are_found_in_a_models_folder(tmp_path):
    write_weights(tmp_path, Accepted())
    assert located(Recipe(pretrained=str(tmp_path))).pretrained == str(tmp_path / "best.pth")
    assert located(Recipe()).pretrained == "none"
    for nothing in (str(tmp_path.parent), ""):
        with pytest.raises(TrainingError, match="holds no model"):
            located(Recipe(pretrained=nothing))


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}])
def test_a_file_of_other_things_than_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(TrainingError, match="holds no weights"):
        pretrained_network(replace(RECIPE, pretrained=str(tmp_path / "other.pth")), "resnet18_small", CIFAR10_CLASSES)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(TrainingError, match="cannot be read as weights"):
        pretrained_network(replace(RECIPE, pretrained=str(tmp_path / "empty.pth")), "resnet18_small", CIFAR10_CLASSES)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_no_weights_is_refused(name, tmp_path):
    (tmp_path / name).write_text("no weights")
    with pytest.raises(TrainingError, match="cannot be read as weights"):
        pretrained_network(replace(RECIPE, pretrained=str(tmp_path / name)), "resnet18_small", CIFAR10_CLASSES)
