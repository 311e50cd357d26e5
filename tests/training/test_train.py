import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mlflow import MlflowClient

from contracts.model import load as load_contract
from handlers.network import build_network
from training.data.images import CIFAR10_CLASSES, divide, load_training_images
from training.data.training_data import make_loader
from training.epoch import train_epoch, validate
from training.errors import DataError, TrainingError
from training.pretrained import pretrained_network
from training.recipe import Augmentation, Cycle, Recipe, recipe_to_dict
from training.run_folder import write_run
from training.tracking.store import tracking_uri
from training.train import _warn_of_few_steps, begin_run, resume, train

# After handlers.network, which declares what torchvision's import needs.

SAMPLES = Path(__file__).parents[1] / "samples"
RECIPE = Recipe(
    data=f"imagefolder:{SAMPLES}", epochs=3, batch_size=40, sizes=((0.0, 8),), precision="fp32", workers=0,
    augmentation=Augmentation(1, 5, 0.2),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")  # seconds; this training takes few
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


def test_contract_says_what_the_weights_were_made_of_and_where(trained):
    accepted = load_contract(trained / "contract.json").accepted
    provenance = accepted.provenance
    (environment,) = provenance.environments
    history = json.loads((trained / "history.json").read_text())
    assert provenance.duration_s == round(sum(figures["epoch_seconds"] for figures in history), 1)
    assert (provenance.training_images, provenance.held_out_images, provenance.epochs) == (80, 20, 3)
    assert provenance.data_sha256 == load_training_images(RECIPE.data, trained)[0].sha256()
    assert environment["version_torch"] == torch.__version__
    assert {"processor", "cuda_device", "git_commit"} <= set(environment)
    assert accepted.recipe["seed"] == 0


def test_mlflow_holds_parameters_metrics_environment_files_and_the_machines_load(trained):
    client = MlflowClient(tracking_uri())
    run = client.get_run(load_contract(trained / "contract.json").accepted.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == "40"
    assert run.data.params["augmentation.magnitude"] == "5"
    assert run.data.params["seed"] == "0"
    assert len(run.data.params["data_sha256"]) == 64
    assert run.data.tags["version_torch"] == torch.__version__
    assert steps_of(client, run.info.run_id) == [1, 2, 3]
    assert "system/cpu_utilization_percentage" in run.data.metrics
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert names == {"best.pth", "contract.json", "history.json", "curves.png"}


def test_mlflow_holds_the_images_learnt_from_and_held_out_as_inputs(trained):
    run = MlflowClient(tracking_uri()).get_run(load_contract(trained / "contract.json").accepted.run_id)
    inputs = {
        entry.tags[0].value: (entry.dataset.digest, json.loads(entry.dataset.profile)["features_shape"][0])
        for entry in run.inputs.dataset_inputs
    }
    parts = divide(load_training_images(RECIPE.data, trained)[0], subset=0, validation=0.2, seed=0)
    assert inputs == {
        name: (part.sha256()[:36], len(part)) for name, part in zip(("training", "validation"), parts, strict=True)
    }


def test_phases_are_nested_runs_with_their_own_parameters_and_epochs(trained, tmp_path, cache):
    recipe = replace(
        RECIPE, pretrained=str(trained / "best.pth"), head_epochs=2, epochs=1, rate=0.01,
        cycles=(Cycle(1, 0.005, augmentation=Augmentation(1, 9)),),
    )  # fmt: skip
    folder = train(recipe, tmp_path / "phases", cache, registers=False)
    client = MlflowClient(tracking_uri())
    parent = load_contract(folder / "contract.json").accepted.run_id
    nested = nested_runs(client, parent)
    assert [run.info.run_name for run in nested] == ["head", "top", "cycle 2"]
    assert [run.data.params["rate"] for run in nested] == ["0.1", "0.01", "0.005"]
    assert [run.data.params["augmentation.magnitude"] for run in nested] == ["5", "5", "9"]
    assert [run.data.params["trained"] for run in nested] == ["fc", "layer3,layer4,fc", "layer3,layer4,fc"]
    assert [steps_of(client, run.info.run_id) for run in nested] == [[1, 2], [3], [4]]
    assert {run.info.status for run in nested} == {"FINISHED"}
    assert steps_of(client, parent) == [1, 2, 3, 4]


def steps_of(client: MlflowClient, run_id: str) -> list[int]:
    return [entry.step for entry in client.get_metric_history(run_id, "validation_accuracy")]


def nested_runs(client: MlflowClient, parent: str) -> list:
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    return sorted(found, key=lambda run: run.data.tags["phase"])


def test_the_best_model_is_registered_as_challenger(trained):
    version = MlflowClient(tracking_uri()).get_model_version_by_alias("cifar10", "challenger")
    assert version.run_id == load_contract(trained / "contract.json").accepted.run_id


KILLED_RUN = """
import json, sys
from pathlib import Path
from training.recipe import recipe_from_dict
from training.train import train
train(recipe_from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), registers=False)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_killed_training_resumes_to_the_same_weights_bit_for_bit_and_in_the_same_runs(tmp_path, cache):
    whole = train(RECIPE, tmp_path / "whole", cache, registers=False)
    killed = tmp_path / "killed"
    arguments = [json.dumps(recipe_to_dict(RECIPE)), str(killed), str(cache)]
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, *arguments], env=_environment())
    wait_for(killed / "curves.png", process)  # the last file of the first epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(killed / "last.pt", weights_only=True)
    assert 0 < len(state["history"]) < RECIPE.epochs
    resume(killed, cache, registers=False)
    assert_same_training(whole, killed)
    client = MlflowClient(tracking_uri())
    assert load_contract(killed / "contract.json").accepted.run_id == state["run_id"]
    (phase,) = nested_runs(client, state["run_id"])
    assert steps_of(client, state["run_id"]) == steps_of(client, phase.info.run_id) == [1, 2, 3]
    assert client.get_run(state["run_id"]).info.status == phase.info.status == "FINISHED"


# Each child process dies at the next one of the moments at which a file of the run is opened or put in its place.
KILLED_AT_EACH_FILE = """
import json, os, signal, sys
from pathlib import Path
from training.recipe import recipe_from_dict
from training.train import resume, train

recipe, folder, cache = recipe_from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])

def die_at(moment):
    seen = 0
    def look(event, arguments):
        nonlocal seen
        changes = event == "os.rename" or (event == "open" and "w" in str(arguments[1]))
        if changes and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(look)

deaths = 0
while True:
    child = os.fork()
    if child == 0:
        die_at(deaths + 1)
        if (folder / "last.pt").exists():
            resume(folder, cache, registers=False)
        else:
            train(recipe, folder, cache, registers=False)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    deaths += 1
print(deaths)
"""


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_training_killed_at_each_file_it_writes_ends_as_an_unbroken_one(tmp_path, cache):
    recipe = replace(RECIPE, epochs=2, cycles=(Cycle(1, 0.05, ((0.0, 8),)),))
    whole = train(recipe, tmp_path / "whole", cache, registers=False)
    arguments = [json.dumps(recipe_to_dict(recipe)), str(tmp_path / "killed"), str(cache)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_FILE, *arguments], env=_environment(), stdout=subprocess.PIPE, check=True
    )
    assert int(done.stdout) > 5
    assert_same_training(whole, tmp_path / "killed")


@pytest.mark.long
def test_between_checkpoints_the_best_weights_are_kept_and_a_killed_training_resumes_to_the_same(tmp_path, cache):
    """As on a GPU, whose epochs are shorter than half a minute."""
    rare = begin_run(RECIPE, tmp_path, cache)
    rare.checkpoint_interval_s = 3600.0
    write_run(rare)
    loader, batches = make_loader(rare.data, RECIPE.augmentation, RECIPE, rare.group)
    rare.begin_phase()
    kept = []
    while not rare.is_finished:
        figures = train_epoch(rare, loader, batches) | validate(rare)
        rare.end_epoch(figures | {"validation_accuracy": 0.9 - 0.1 * rare.epoch})  # the first epoch is the best
        kept.append({name: value.clone() for name, value in rare.kept().state_dict().items()})
        assert rare.is_checkpoint_due == rare.is_finished
    assert not (tmp_path / "best.pth").exists()
    write_run(rare)
    best = weights(tmp_path)
    assert all(torch.equal(best[name], kept[0][name]) for name in best)
    (tmp_path / "best.pth").unlink()
    resume(tmp_path, cache, registers=False)
    assert all(torch.equal(value, best[name]) for name, value in weights(tmp_path).items())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.long
def test_finished_training_goes_on_with_another_cycle_as_if_it_had_been_planned(tmp_path, cache):
    planned = replace(RECIPE, epochs=1, cycles=(Cycle(2, 0.05, ((0.0, 8),), Augmentation(2, 7, cutmix=0.5)),))
    whole = train(planned, tmp_path / "whole", cache, registers=False)
    extended = train(replace(planned, cycles=()), tmp_path / "extended", cache, registers=False)
    resume(extended, cache, changes={"cycles": recipe_to_dict(planned)["cycles"]}, registers=False)
    assert_same_training(whole, extended)


@pytest.mark.long
def test_cycle_that_blends_begins_with_a_mean_of_two_beginnings(tmp_path, cache):
    recipe = replace(RECIPE, epochs=1, cycles=(Cycle(1, 0.05), Cycle(1, 0.01, blend=0.25)))
    folder = train(replace(recipe, cycles=recipe.cycles[:1]), tmp_path / "run", cache, registers=False)
    before = torch.load(folder / "last.pt", weights_only=True)
    resume(folder, cache, changes={"cycles": recipe_to_dict(recipe)["cycles"]}, registers=False)
    begun = torch.load(folder / "last.pt", weights_only=True)["begun"]
    for key in ("conv1.weight", "bn1.running_mean", "fc.bias"):
        wanted = 0.25 * before["begun"][key] + 0.75 * before["averaged"][f"module.{key}"]
        torch.testing.assert_close(begun[key], wanted)
    assert not torch.equal(begun["fc.bias"], before["begun"]["fc.bias"])


@pytest.mark.long
def test_training_from_a_model_of_ours_names_it_and_can_blend_with_it(trained, tmp_path, cache):
    shutil.copytree(trained, tmp_path / "start")
    recipe = replace(
        RECIPE, pretrained=str(tmp_path / "start" / "best.pth"), head_epochs=0, epochs=1, unfreeze=("all",),
        cycles=(Cycle(1, 0.01, blend=0.5),),
    )  # fmt: skip
    planned = train(replace(recipe, cycles=()), tmp_path / "run", cache, registers=False)
    averaged = torch.load(planned / "last.pt", weights_only=True)["averaged"]
    shutil.rmtree(tmp_path / "start")
    resume(planned, cache, changes={"cycles": recipe_to_dict(recipe)["cycles"]}, registers=False)
    begun = torch.load(planned / "last.pt", weights_only=True)["begun"]
    for key in ("conv1.weight", "bn1.running_mean"):
        torch.testing.assert_close(begun[key], (weights(trained)[key] + averaged[f"module.{key}"]) / 2)
    ancestor = load_contract(planned / "contract.json").accepted.ancestor
    assert (ancestor.name, ancestor.version) == ("cifar10", "0")
    assert ancestor.accepted == load_contract(trained / "contract.json").accepted


def test_resumed_training_takes_no_other_hyper_parameters(trained, cache):
    with pytest.raises(TrainingError, match="cannot change rate"):
        resume(trained, cache, changes={"rate": 0.3})


def assert_same_training(one: Path, other: Path) -> None:
    """The same weights, bit for bit, and the same figures."""
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (one, other)]
    for part in ("network", "averaged"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name
    best = [weights(folder) for folder in (one, other)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    accepted = [load_contract(folder / "contract.json").accepted for folder in (one, other)]
    assert accepted[0].figures == accepted[1].figures
    assert accepted[0].recipe == accepted[1].recipe
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, other)]
    assert [figures["loss"] for figures in histories[0]] == [figures["loss"] for figures in histories[1]]


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


def test_two_trainings_do_not_share_a_folder(trained, cache):
    with FileLock(trained / ".lock"):
        with pytest.raises(TrainingError, match="another process"):
            resume(trained, cache)
        with pytest.raises(TrainingError, match="another process"):
            train(RECIPE, trained, cache)


def test_checkpoint_that_cannot_be_read_is_named(tmp_path, cache):
    (tmp_path / "last.pt").write_bytes(b"PK torn")
    with pytest.raises(TrainingError, match=r"last\.pt cannot be read"):
        resume(tmp_path, cache)


def test_resume_with_other_images_is_refused(tmp_path, cache):
    shutil.copytree(SAMPLES, tmp_path / "images")
    recipe = replace(RECIPE, data=f"imagefolder:{tmp_path}/images", epochs=1)
    train(recipe, tmp_path / "run", cache, registers=False)
    written = (tmp_path / "run" / "contract.json").read_bytes()
    shutil.copyfile(SAMPLES / "cat" / "0.png", tmp_path / "images" / "dog" / "another.png")
    with pytest.raises(TrainingError, match="not those that the training"):
        resume(tmp_path / "run", cache, registers=False)
    assert (tmp_path / "run" / "contract.json").read_bytes() == written


def test_a_training_that_is_cut_off_in_an_epoch_keeps_the_last_whole_ones_checkpoint(tmp_path, cache, monkeypatch):
    """Also where MLflow, away until then, answers just as it ends, and the run gets its id."""
    folder = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")

    def interrupted(run, loader, batches):
        figures = train_epoch(run, loader, batches)
        if not run.history:
            return figures
        interrupted.checkpoint = (folder / "last.pt").read_bytes()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        raise KeyboardInterrupt

    monkeypatch.setattr("training.train.train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, folder, cache, registers=False)
    assert (folder / "last.pt").read_bytes() == interrupted.checkpoint


def test_weights_that_have_learnt_what_would_be_held_out_are_refused(trained, tmp_path, cache):
    recipe = replace(RECIPE, pretrained=str(trained / "best.pth"), validation=0.3)
    with pytest.raises(TrainingError, match=r"--subset 0 --validation 0\.2 --seed 0"):
        train(recipe, tmp_path / "run", cache, registers=False)


def test_resume_without_a_checkpoint_says_so(tmp_path, cache):
    with pytest.raises(TrainingError, match="no checkpoint"):
        resume(tmp_path, cache)
    with pytest.raises(TrainingError, match="no checkpoint"):
        resume(tmp_path / "mistyped", cache)
    assert not (tmp_path / "mistyped").exists()


def test_resume_does_without_the_weights_that_the_training_began_with(trained, tmp_path, cache):
    shutil.copyfile(trained / "best.pth", tmp_path / "begin.pth")
    recipe = replace(RECIPE, pretrained=str(tmp_path / "begin.pth"), head_epochs=0, epochs=1)
    train(recipe, tmp_path / "run", cache, registers=False)
    (tmp_path / "begin.pth").unlink()
    resume(tmp_path / "run", cache, registers=False)


def test_frozen_backbone_keeps_weights_and_batch_norm_statistics(trained, tmp_path, cache):
    recipe = replace(RECIPE, pretrained=str(trained / "best.pth"), head_epochs=1, epochs=1, unfreeze=("layer4",))
    start = weights(trained)
    (tmp_path / "transfer").mkdir()
    run = begin_run(recipe, tmp_path / "transfer", cache)
    loader, batches = make_loader(run.data, recipe.augmentation, recipe, run.group)
    run.begin_phase()
    figures = train_epoch(run, loader, batches)
    moved = {name for name, value in run.network.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"fc.weight", "fc.bias"}
    run.end_epoch(figures | validate(run))
    run.begin_phase()
    train_epoch(run, loader, batches)
    moved = {
        name.split(".")[0] for name, value in run.network.state_dict().items() if not torch.equal(value, start[name])
    }
    assert moved == {"fc", "layer4"}


def test_head_is_kept_for_the_same_classes_only(trained):
    kept = replace(RECIPE, pretrained=str(trained / "best.pth"))
    head = weights(trained)["fc.weight"]
    same = pretrained_network(kept, "resnet18_small", CIFAR10_CLASSES)
    assert torch.equal(same.state_dict()["fc.weight"], head)
    other = pretrained_network(kept, "resnet18_small", (*CIFAR10_CLASSES[:9], "tram"))
    assert not torch.equal(other.state_dict()["fc.weight"], head)


def test_tracking_that_fails_does_not_cost_the_training(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    folder = train(replace(RECIPE, epochs=1), tmp_path / "run", cache)
    assert (folder / "best.pth").exists()
    assert "MLflow" in caplog.text


@pytest.mark.long
def test_recipe_with_pixmix_trains_on_a_processor_too(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("training.data.device_augment._FRACTALS", 2)
    recipe = replace(RECIPE, epochs=1, augmentation=Augmentation(1, 5, pixmix=0.5), sam_radius=0.05, sam_from=0.0)
    assert weights(train(recipe, tmp_path / "run", cache, registers=False))


def test_a_training_that_cannot_begin_says_nothing_about_resuming(tmp_path, cache, caplog):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    with pytest.raises(DataError), caplog.at_level("INFO"):
        train(replace(RECIPE, data=f"imagefolder:{tmp_path}/images"), tmp_path / "run", cache)
    assert "--resume" not in caplog.text


def test_a_batch_larger_than_the_data_is_warned_of(caplog):
    _warn_of_few_steps(128, 128)
    assert not caplog.records
    _warn_of_few_steps(96, 128)
    assert "96 images to learn from and a batch of 128: each epoch is one step" in caplog.text
    assert caplog.text.rstrip().endswith("--batch-size 8")
