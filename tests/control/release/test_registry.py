"""MLflow's registry beside the operator's commands: what names a registered version; a dead one stops nothing."""

import json
import time

import pytest

from contracts.plan import Plan, Release
from control.errors import ImpossibleMove, RegistryUnusable
from control.release import registry
from control.release.plan_store import PlanStore
from control.release.registry import Reference, parse_reference
from control.release.rollout import Rollout

STABLE, OTHER = (Release(version, f"m-{version}.mar", version[0] * 64, 1) for version in ("1.0", "2.0"))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("cifar10@champion", Reference("cifar10", "champion", None)),
        ("cifar10/3", Reference("cifar10", None, "3")),
        ("1.0.1", None),
        ("1.0.1+build-2", None),
        ("store/cifar10-1.0.1.mar", None),
        ("cifar10@prod.mar", None),
        ("cifar10/three", None),
        ("../cifar10/3", None),
        ("cifar10@", None),
    ],
)
def test_a_registered_version_is_named_as_mlflow_does(what, expected):
    assert parse_reference(what) == expected


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", STABLE, retained=(OTHER,)), "first")
    return store


def test_a_dead_registry_stops_neither_promotion_nor_roll_back_and_that_is_said(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said = []
    rollout = Rollout(store, [], store.home, said.append)
    began = time.monotonic()
    assert rollout.promote("2.0").stable == OTHER
    assert rollout.rollback().stable == STABLE
    assert time.monotonic() - began < 10
    assert [line for line in said if line.startswith("WARNING: MLflow was not told that")] == said[1::2]
    notes = [json.loads(line)["what"] for line in store.audit_path.read_text().splitlines()]
    assert notes[1:] == ["promote 2.0", "registry not told of 2.0", "rollback to 1.0", "registry not told of 1.0"]


def test_where_there_is_no_registry_nothing_is_told(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert not registry.is_used()
    said = []
    Rollout(store, [], store.home, said.append).promote("2.0")
    assert said == ["promote 2.0: done, revision 2"]
    assert not (store.home / "mlflow.db").exists()


def test_a_registered_version_of_another_model_or_of_a_dead_registry_is_refused(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    rollout = Rollout(store, [], store.home, print)
    with pytest.raises(ImpossibleMove, match="the plan is of m, not of dogs"):
        rollout.deploy("dogs@champion")
    with pytest.raises(RegistryUnusable, match="does not answer"):
        rollout.deploy("m@champion")
    assert store.read().revision == 1
