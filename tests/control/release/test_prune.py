"""`gradserve prune` finds and removes only what no plan, archive or other training uses."""

import base64
import fcntl
import json
import os
import time
import zipfile

import pytest
from typer.testing import CliRunner

from contracts.plan import Plan, Release
from control.archive import file_sha256
from control.cli.main import app
from control.release.plan_store import PlanStore

DAY_S = 86_400
REFERENCE = {"tolerance": 0.01, "images": [base64.b64encode(b"png").decode()], "probabilities": [[0.25, 0.75]]}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("AGENT_", "GRADSERVE_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_store").mkdir()


def contract(version, run_id="", ancestor=None):
    accepted = {"run_id": run_id} | (
        {"ancestor": {"name": "m", "version": "0", "accepted": ancestor}} if ancestor else {}
    )
    return {
        "schema": 1, "name": "m", "version": version, "classes": ["cat", "dog"], "architecture": "resnet18_small",
        "input": {"height": 32, "width": 32, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "explain": {"layer": "layer4"}, "engine": {"name": "eager"}, "accepted": accepted,
    }  # fmt: skip


def age(path, days):
    then = time.time() - days * DAY_S
    for found in (*path.rglob("*"), path):
        os.utime(found, (then, then))


@pytest.fixture
def archive(tmp_path):
    """`archive(version, days, …)`: a release of that age in the model store."""

    def make(version, days, **contents):
        path = tmp_path / "model_store" / f"m-{version}.mar"
        with zipfile.ZipFile(path, "w") as members:
            members.writestr("contract.json", json.dumps(contract(version, **contents)))
            members.writestr("reference.json", json.dumps(REFERENCE))
            members.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelVersion": version}}))
        path.with_name(f"{path.name}.sha256").write_text(file_sha256(path))
        age(path, days)
        return Release(version, path.name, file_sha256(path))

    return make


@pytest.fixture
def training(tmp_path):
    """`training(name, days, …)`: the folder of a training of that age."""

    def make(name, days, **contents):
        folder = tmp_path / ".gradserve" / "training" / name
        folder.mkdir(parents=True)
        (folder / "last.pt").write_bytes(bytes(1000))
        (folder / "contract.json").write_text(json.dumps(contract("0", **contents)))
        age(folder, days)
        return folder

    return make


@pytest.fixture
def store(tmp_path):
    return PlanStore(tmp_path / ".gradserve")


def plan(store, *args, **kwargs):
    with store.lock("test"):
        return store.write(Plan(0, "m", *args, **kwargs), "test")


def prune(*arguments, code=0):
    result = CliRunner().invoke(app, ["prune", *arguments])
    assert result.exit_code == code, result.output
    return result


def found(*arguments):
    return {row["name"].rpartition("/")[2] for row in json.loads(prune("--json", *arguments).stdout)["unused"]}


def test_archives_that_the_plan_does_not_name_are_removed_with_their_checksums(archive, store, tmp_path):
    kept = {version: archive(version, 90) for version in ("1.0", "2.0", "3.0", "4.0")}
    plan(store, kept["1.0"], retained=(kept["2.0"], kept["3.0"]), previous=(kept["4.0"],))
    archive("5.0", 90)
    archive("6.0", 2)
    released = tmp_path / "model_store" / "released"
    released.mkdir()
    (released / "contract.json").write_text(json.dumps(contract("7.0")))
    archive("7.0", 90)
    (tmp_path / "model_store" / "foreign.mar").write_bytes(b"somebody else's")
    age(tmp_path / "model_store" / "foreign.mar", 90)
    assert found() == {"m-5.0.mar"}
    assert (tmp_path / "model_store" / "m-5.0.mar").exists(), "a dry run removes nothing"
    prune("--yes")
    left = {path.name for path in (tmp_path / "model_store").iterdir() if path.is_file()}
    expected = {f"m-{version}.mar" for version in ("1.0", "2.0", "3.0", "4.0", "6.0", "7.0")}
    assert left == expected | {f"{name}.sha256" for name in expected} | {"foreign.mar"}
    line = json.loads(store.audit_path.read_text().splitlines()[-1])
    assert (line["what"], line["removed"]) == ("prune", ["model_store/m-5.0.mar"])


def test_trainings_of_kept_archives_and_their_ancestors_stay(archive, training, store):
    stable = archive("1.0", 90, run_id="made-it", ancestor={"run_id": "began-it", "ancestor": None})
    plan(store, stable)
    for name in ("made-it", "began-it", "forgotten"):
        training(name, 90, run_id=name)
    training("young", 1, run_id="young", ancestor={"run_id": "grandparent"})
    training("grandparent", 90, run_id="grandparent")
    killed = training("killed", 90)
    (killed / "contract.json").unlink()
    age(killed, 90)
    running = training("running", 90, run_id="running")
    (running / ".lock").touch()
    age(running, 90)
    with (running / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found() == {"forgotten", "killed"}
        prune("--yes")
    assert {path.name for path in running.parent.iterdir()} == {
        "made-it", "began-it", "young", "grandparent", "running"
    }  # fmt: skip


def test_the_last_revisions_and_the_one_in_force_stay(archive, store):
    release = archive("1.0", 1)
    for _ in range(30):
        plan(store, release)
    age(store.home / "history", 90)
    today = store.path.read_text()
    plans = json.loads(today)
    old = {"schema": 1, "revision": plans["revision"], **plans["models"][0]}
    del old["previous"]
    store.path.write_text(json.dumps(old))
    assert found() == set(), "a plan of schema 1 is rolled back by its history"
    store.path.write_text(today)
    output = prune("--yes").stdout
    assert "plan-000001 … plan-000010 (10 revisions)" in output
    assert len(list((store.home / "history").iterdir())) == 20
    assert plan(store, release).revision == 31


def test_zero_days_means_any_age_and_an_unreachable_registry_keeps_all_trainings(archive, training, store, monkeypatch):
    plan(store, archive("1.0", 0))
    archive("2.0", 0.01)
    training("try", 0.01)
    assert found() == set()
    assert found("--days", "0") == {"m-2.0.mar", "try"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = prune("--json", "--days", "0", code=1)
    assert [row["kind"] for row in json.loads(result.stdout)["unused"]] == ["archive"]
    assert "the versions that the registry uses are unknown" in result.stderr
