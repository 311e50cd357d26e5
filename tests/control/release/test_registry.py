"""MLflow's registry in the operator's commands: references to versions, and commands with a registry that is down."""

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
def test_references_have_mlflows_syntax(what, expected):
    assert parse_reference(what) == expected


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", STABLE, retained=(OTHER,)), "first")
    return store


def test_promotion_and_rollback_work_with_a_warning_while_the_registry_is_down(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    lines = []
    rollout = Rollout(store, [], store.home, lines.append)
    began = time.monotonic()
    assert rollout.promote("2.0").stable == OTHER
    assert rollout.rollback().stable == STABLE
    assert time.monotonic() - began < 10
    assert [line for line in lines if line.startswith("WARNING: MLflow's aliases were not moved")] == lines[1::2]
    notes = [json.loads(line)["what"] for line in store.audit_path.read_text().splitlines()]
    assert notes[1:] == [
        "promote 2.0",
        "registry not updated for 2.0",
        "rollback to 1.0",
        "registry not updated for 1.0",
    ]


def test_without_a_registry_none_is_created(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert not registry.is_used()
    lines = []
    Rollout(store, [], store.home, lines.append).promote("2.0")
    assert lines == ["promote 2.0: done, revision 2"]
    assert not (store.home / "mlflow.db").exists()


def test_a_deploy_from_a_registry_refuses_another_model_and_a_registry_that_is_down(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    rollout = Rollout(store, [], store.home, print)
    with pytest.raises(ImpossibleMove, match="dogs is another model than m: add --model dogs"):
        rollout.deploy("dogs@champion")
    with pytest.raises(RegistryUnusable, match="does not answer"):
        rollout.deploy("m@champion")
    assert store.read().revision == 1
