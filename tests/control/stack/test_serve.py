import json
import os
import shutil
from pathlib import Path

import pytest

from contracts.plan import Plan, Release
from control.errors import ArchiveError, ImpossibleMove, NoModel, OtherModel
from control.release.archive_source import fetch
from control.release.plan_store import PlanStore
from control.stack.running import RunningStack, announced
from control.stack.serve import (
    find_served,
    free_version,
    next_command,
    plan_served,
    refuse_other_model,
    serve_command,
)
from control.stack.stack import example_image
from training.package.export import package_directory

RELEASED = Path(__file__).parents[3] / "model_store" / "released"
OTHER = Plan(1, "photos", Release("1.0.0", "photos-1.0.0.mar", "0" * 64))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The released model, packed as that of one's own images `pets`, with a class that no sample is of."""
    folder = Path(shutil.copytree(RELEASED, tmp_path_factory.mktemp("own") / "released"))
    contract = json.loads((folder / "contract.json").read_text())
    contract |= {"name": "pets", "version": "1.0.0", "classes": [f"pet {number}" for number in range(10)]}
    (folder / "contract.json").write_text(json.dumps(contract))
    return package_directory(folder, tmp_path_factory.mktemp("store"))


@pytest.fixture
def store(tmp_path, monkeypatch) -> PlanStore:
    monkeypatch.chdir(tmp_path)
    return PlanStore(tmp_path / ".gradserve")


@pytest.fixture
def run(tmp_path) -> Path:
    """What a training leaves, as far as serving looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "contract.json").write_text(json.dumps({"name": "pets"}))
    (folder / "best.pth").touch()
    return folder


def write(store: PlanStore, plan: Plan) -> None:
    with store.lock("test"):
        store.write(plan, "first")


def test_an_archive_becomes_the_stable_version_under_its_own_name(store, archive, tmp_path):
    said: list[str] = []
    plan = plan_served(store, archive, tmp_path / "models", said.append)
    assert (plan.model, plan.stable.version, plan.stable.archive) == ("pets", "1.0.0", "pets-1.0.0.mar")
    assert (tmp_path / "models" / "pets-1.0.0.mar").read_bytes() == archive.read_bytes()
    assert said == ["serving pets 1.0.0 from pets-1.0.0.mar"]
    assert plan_served(store, archive, tmp_path / "models", said.append) == plan
    image = example_image(store, tmp_path / "models")
    assert (image, image.read_bytes()[:4]) == (store.home / "example.png", b"\x89PNG")


def test_a_plan_of_another_model_is_left_alone_and_the_way_out_is_told(store, archive, tmp_path):
    write(store, OTHER)
    way_out = "GRADSERVE_HOME=.gradserve-pets gradserve serve run"
    with pytest.raises(OtherModel, match=f"the plan in force is of photos, not of pets.*{way_out}$"):
        refuse_other_model(store, "pets", Path("run"))
    with pytest.raises(OtherModel):
        plan_served(store, archive, tmp_path / "models", print)
    assert store.read().model == "photos"
    with announced(store.home, RunningStack(os.getpid(), "http://127.0.0.1:8000", "http://127.0.0.1:9100")):
        assert serve_command(store.home, "pets", Path("run")) == f"{way_out} --port 8001"


def test_another_version_of_the_model_replaces_the_stable_one_unless_a_stack_runs(store, archive, tmp_path):
    write(store, Plan(1, "pets", Release("0.9.0", "pets-0.9.0.mar", "0" * 64)))
    with announced(store.home, RunningStack(os.getpid(), "http://127.0.0.1:8000", "http://127.0.0.1:9100")):
        with pytest.raises(ImpossibleMove, match=r"gradserve deploy 1\.0\.0 --canary 10"):
            plan_served(store, archive, tmp_path / "models", print)
        assert next_command(store.home, archive, "pets", "1.0.0") == "gradserve deploy 1.0.0 --canary 10"
    assert next_command(store.home, archive, "pets", "1.0.0") == f"gradserve serve {archive}"
    plan = plan_served(store, archive, tmp_path / "models", print)
    assert (plan.stable.version, [release.version for release in plan.previous]) == ("1.0.0", ["0.9.0"])
    assert store.read() == plan


def test_a_run_is_packed_once_for_each_training(run):
    assert not find_served(run).is_packed
    packed = run / "package-1.0.0"
    packed.mkdir()
    (packed / "reference.json").touch()
    os.utime(run / "best.pth", (1, 1))
    assert find_served(run).path == packed
    os.utime(packed / "reference.json", (0, 0))  # trained on since
    assert find_served(run).path == run
    with pytest.raises(NoModel, match=r"contract\.json"):
        find_served(run / "nothing")


def test_versions_are_counted_by_the_archives_in_the_model_store(tmp_path):
    assert free_version("pets", tmp_path) == "1.0.0"
    (tmp_path / "pets-1.0.0.mar").touch()
    assert (free_version("pets", tmp_path), free_version("cats", tmp_path)) == ("1.0.1", "1.0.0")


def test_a_deploy_of_another_models_version_says_how_to_serve_it(archive):
    beside = r"GRADSERVE_HOME=\.gradserve-pets gradserve serve .*pets-1\.0\.0\.mar --port 8001"
    for what in ("1.0.0", str(archive)):
        plan = Plan(1, "cifar10", Release("0.8.0", "cifar10-0.8.0.mar", "0" * 64))
        with pytest.raises(ArchiveError, match=beside):
            fetch(plan, what, archive.parent, print)
