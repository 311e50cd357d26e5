import json
import os
import shutil
from pathlib import Path

import pytest

from contracts.plan import Plan, Release
from control.errors import ImpossibleMove, NoModel, OtherModel
from control.release.plan_store import PlanStore
from control.stack.running import RunningStack, announce
from control.stack.serve import (
    find_model,
    free_version,
    next_command,
    plan_archive,
    refuse_other_model,
    serve_command,
)
from control.stack.stack import example_image
from training.package.export import package_directory

RELEASED = Path(__file__).parents[3] / "model_store" / "released"
OTHER = Plan(1, "photos", Release("1.0.0", "photos-1.0.0.mar", "0" * 64))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The released model, packed as the model `pets`, whose classes no sample image belongs to."""
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
    """The files of a finished training that serving reads."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "contract.json").write_text(json.dumps({"name": "pets"}))
    (folder / "best.pth").touch()
    return folder


def write(store: PlanStore, plan: Plan) -> None:
    with store.lock("test"):
        store.write(plan, "first")


def test_an_archive_becomes_the_stable_version_under_its_own_name(store, archive, tmp_path):
    lines: list[str] = []
    plan = plan_archive(store, archive, tmp_path / "models", lines.append)
    assert (plan.model, plan.stable.version, plan.stable.archive) == ("pets", "1.0.0", "pets-1.0.0.mar")
    assert (tmp_path / "models" / "pets-1.0.0.mar").read_bytes() == archive.read_bytes()
    assert lines == ["serving pets 1.0.0 from pets-1.0.0.mar"]
    assert plan_archive(store, archive, tmp_path / "models", lines.append) == plan
    image = example_image(store, tmp_path / "models")
    assert (image, image.read_bytes()[:4]) == (store.home / "example.png", b"\x89PNG")


def test_a_plan_of_another_model_is_refused_with_a_command_that_works(store, archive, tmp_path):
    write(store, OTHER)
    command = "GRADSERVE_HOME=.gradserve-pets gradserve serve run"
    with pytest.raises(OtherModel, match=f"the plan in force serves photos, not pets.*{command}$"):
        refuse_other_model(store, "pets", Path("run"))
    with pytest.raises(OtherModel):
        plan_archive(store, archive, tmp_path / "models", print)
    assert store.read().model == "photos"
    with announce(store.home, RunningStack(os.getpid(), "http://127.0.0.1:8000", "http://127.0.0.1:9100")):
        assert serve_command(store.home, "pets", Path("run")) == f"{command} --port 8001"


def test_another_version_of_the_model_replaces_the_stable_one_unless_a_stack_runs(store, archive, tmp_path):
    write(store, Plan(1, "pets", Release("0.9.0", "pets-0.9.0.mar", "0" * 64)))
    with announce(store.home, RunningStack(os.getpid(), "http://127.0.0.1:8000", "http://127.0.0.1:9100")):
        with pytest.raises(ImpossibleMove, match=r"gradserve deploy 1\.0\.0 --canary 10"):
            plan_archive(store, archive, tmp_path / "models", print)
        assert next_command(store.home, archive, "pets", "1.0.0") == "gradserve deploy 1.0.0 --canary 10"
    assert next_command(store.home, archive, "pets", "1.0.0") == f"gradserve serve {archive}"
    plan = plan_archive(store, archive, tmp_path / "models", print)
    assert (plan.stable.version, [release.version for release in plan.previous]) == ("1.0.0", ["0.9.0"])
    assert store.read() == plan


def test_a_run_is_packed_again_only_after_more_training(run):
    assert not find_model(run).is_packed
    packed = run / "package-1.0.0"
    packed.mkdir()
    (packed / "reference.json").touch()
    os.utime(run / "best.pth", (1, 1))
    assert find_model(run).path == packed
    os.utime(packed / "reference.json", (0, 0))  # trained again after packing
    assert find_model(run).path == run
    with pytest.raises(NoModel, match=r"contract\.json"):
        find_model(run / "nothing")


def test_the_next_version_is_the_first_without_an_archive(tmp_path):
    assert free_version("pets", tmp_path) == "1.0.0"
    (tmp_path / "pets-1.0.0.mar").touch()
    assert (free_version("pets", tmp_path), free_version("cats", tmp_path)) == ("1.0.1", "1.0.0")


def test_the_next_command_is_named_beside_a_broken_plan_too(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    assert serve_command(tmp_path, "pets", Path("run")) == "gradserve serve run"
