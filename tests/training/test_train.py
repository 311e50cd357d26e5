import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from handlers.contract import load as load_contract
from handlers.engines import softmax
from handlers.network import build_network
from training.artifacts import find_model, read_model
from training.augment import training_loader
from training.data import CIFAR10_CLASSES, load_training_images
from training.errors import TrainingError
from training.inference import predict_logits
from training.pretrained import pretrained_network
from training.recipe import Augmentation, Recipe, recipe_to_dict
from training.run import Run
from training.tracking import tracking_uri
from training.train import resume, train

# After handlers.network, which declares what torchvision's import needs.
from torchvision.models import ResNet18_Weights  # isort: skip

SAMPLES = Path(__file__).parents[1] / "samples"
RECIPE = Recipe(
    data=f"imagefolder:{SAMPLES}", epochs=3, batch_size=16, sizes=((0.0, 8),), precision="fp32", workers=0,
    augmentation=Augmentation(1, 5, 0.2),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> Path:
    return train(RECIPE, tmp_path_factory.mktemp("runs") / "whole", cache)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "best.pth", weights_only=True)


def test_run_leaves_weights_contract_history_and_curves(trained):
    contract = load_contract(trained / "contract.json")
    assert contract.classes[0] == "airplane"
    assert (contract.input.height, contract.architecture) == (32, "resnet18_small")
    assert len(json.loads((trained / "history.json").read_text())) == 3
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    build_network("resnet18_small", 10).load_state_dict(weights(trained))


def test_mlflow_holds_parameters_metrics_environment_and_files(trained):
    client = MlflowClient(tracking_uri())
    run = client.get_run(load_contract(trained / "contract.json").accepted["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == "16"
    assert run.data.params["augmentation.magnitude"] == "5"
    assert run.data.tags["version_torch"] == torch.__version__
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "validation_accuracy")] == [1, 2, 3]
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert names == {"best.pth", "contract.json", "history.json", "curves.png"}


def test_best_model_is_registered_as_challenger_and_loads_without_a_pickle(trained, monkeypatch):
    folder = find_model("models:/cifar10@challenger")
    assert not [path for path in folder.parents[1].rglob("*") if path.suffix in {".pkl", ".pth", ".pt"}]
    mlflow.set_tracking_uri(tracking_uri())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, about type hints
        loaded = mlflow.pyfunc.load_model("models:/cifar10@challenger")
    images, size = load_training_images(RECIPE.data, trained)
    logits = predict_logits(read_model(trained)[1], images.images, size).numpy()
    np.testing.assert_allclose(loaded.predict(images.images), softmax(logits, 1.0), atol=1e-5)


KILLED_RUN = """
import json, sys
from pathlib import Path
from training.recipe import recipe_from_dict
from training.train import train
train(recipe_from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_killed_training_resumes_to_the_same_weights_bit_for_bit(tmp_path, cache):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(RECIPE, tmp_path / "whole", cache, registers=False)
        killed = tmp_path / "killed"
        arguments = [json.dumps(recipe_to_dict(RECIPE)), str(killed), str(cache)]
        process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, *arguments], env=_environment())
        wait_for(killed / "last.pt", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(torch.load(killed / "last.pt", weights_only=True)["history"])
        assert done < RECIPE.epochs
        resume(killed, cache, registers=False)
    finally:
        torch.set_num_threads(threads)
    for folder in (whole, killed):
        assert len(torch.load(folder / "last.pt", weights_only=True)["history"]) == RECIPE.epochs
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (whole, killed)]
    for part in ("network", "averaged"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the training ended before it wrote a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_folder_with_a_training_is_not_overwritten(trained, cache):
    with pytest.raises(TrainingError, match="--resume"):
        train(RECIPE, trained, cache)


def test_resume_without_a_checkpoint_says_so(tmp_path, cache):
    with pytest.raises(TrainingError, match="no checkpoint"):
        resume(tmp_path, cache)


def test_frozen_backbone_keeps_weights_and_batch_norm_statistics(trained, tmp_path, cache):
    recipe = replace(RECIPE, pretrained=str(trained / "best.pth"), head_epochs=1, epochs=1, unfreeze=("layer4",))
    start = weights(trained)
    (tmp_path / "transfer").mkdir()
    run = Run(recipe, tmp_path / "transfer", cache)
    loader, batches = training_loader(
        run.training_images, run.input, recipe.augmentation, batch_size=16, workers=0, seed=0
    )
    run.train_epoch(loader, batches)
    moved = {name for name, value in run.network.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"fc.weight", "fc.bias"}
    run.advance()
    run.train_epoch(loader, batches)
    moved = {
        name.split(".")[0] for name, value in run.network.state_dict().items() if not torch.equal(value, start[name])
    }
    assert moved == {"fc", "layer4"}


def test_tracking_that_fails_does_not_cost_the_training(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    folder = train(replace(RECIPE, epochs=1), tmp_path / "run", cache)
    assert (folder / "best.pth").exists()
    assert "MLflow" in caplog.text


@pytest.fixture
def hub(tmp_path) -> Iterator[Path]:
    """An empty cache of torch's hub."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub"
    torch.hub.set_dir(before)


@pytest.fixture
def weights_server(tmp_path) -> Iterator[str]:
    """Serves a state dict of torchvision's keys and shapes."""
    served = tmp_path / "served"
    served.mkdir()
    torch.manual_seed(0)
    torch.save(build_network("resnet18", 1000).state_dict(), served / "resnet18.pth")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(served))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/resnet18.pth"
        server.shutdown()
        thread.join()


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_imagenet_weights_come_from_torchvisions_loader_with_the_stems_centre(weights_server, hub):
    name = ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    state = torch.hub.load_state_dict_from_url(weights_server, file_name=name, progress=False, weights_only=True)
    network = pretrained_network(replace(RECIPE, pretrained="imagenet"), "resnet18_small", CIFAR10_CLASSES).state_dict()
    assert torch.equal(network["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert torch.equal(network["conv1.weight"], state["conv1.weight"][:, :, 2:5, 2:5])
    assert network["fc.weight"].shape == (10, 512)


def test_imagenet_weights_out_of_reach_say_what_to_do(hub, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(TrainingError, match=r"resnet18-.*pth into .*hub/checkpoints, or train with --pretrained none"):
        pretrained_network(replace(RECIPE, pretrained="imagenet"), "resnet18_small", CIFAR10_CLASSES)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(TrainingError, match="no weights of resnet18_small"):
        pretrained_network(replace(RECIPE, pretrained=str(tmp_path / "other.pth")), "resnet18_small", CIFAR10_CLASSES)
