import json
from dataclasses import replace

import pytest

from contracts import plan as traffic_plan
from control.errors import (
    AnotherOperator,
    ImpossibleMove,
    ModelNotPlanned,
    NoPlan,
    PlanUnusable,
)
from control.release.plan_folder import write_atomically
from control.release.plan_store import PlanStore

PLAN = traffic_plan.Plan(0, "cifar10", traffic_plan.Release("1.0.0", "cifar10-1.0.0.mar", "a" * 64))

OTHER = traffic_plan.Release("2.0.0", "cifar10-2.0.0.mar", "b" * 64)
PHOTOS = traffic_plan.Plan(0, "photos", traffic_plan.Release("1.0.0", "photos-1.0.0.mar", "c" * 64))


@pytest.fixture
def store(tmp_path):
    return PlanStore(tmp_path / "home")


def test_each_change_is_a_revision_with_history_and_an_audit_line(store, monkeypatch):
    monkeypatch.setenv("GRADSERVE_OPERATOR", "alice")
    with store.lock("test"):
        store.write(PLAN, "first plan")
        store.write(PLAN, "again", reason="because")
    assert store.read().revision == 2
    assert sorted(path.name for path in (store.home / "history").iterdir()) == ["plan-000001.json", "plan-000002.json"]
    first, second = map(json.loads, store.audit_path.read_text().splitlines())
    assert (first["who"], first["what"], first["before"]) == ("alice", "first plan", None)
    assert (second["before"]["revision"], second["after"]["revision"], second["reason"]) == (1, 2, "because")


def test_a_revision_is_not_used_again_after_the_plan_was_deleted(store):
    with store.lock("test"):
        store.write(PLAN, "first plan")
        store.path.unlink()
        assert store.write(PLAN, "again").revision == 2


def test_the_next_write_records_a_revision_whose_writer_was_killed(store):
    with store.lock("test"):
        store.write(PLAN, "first plan")
        killed = traffic_plan.Plans(2, "cifar10", (replace(PLAN, revision=2, retained=(OTHER,)),))
        write_atomically(store.path, json.dumps(traffic_plan.dump(killed)))
        assert store.write(PLAN, "again").revision == 3
    assert traffic_plan.load(store.home / "history" / "plan-000002.json") == killed
    assert [json.loads(line)["after"]["revision"] for line in store.audit_path.read_text().splitlines()] == [1, 2, 3]


def test_a_second_operator_is_refused_with_the_name_of_the_first(store, monkeypatch):
    monkeypatch.setenv("GRADSERVE_OPERATOR", "alice")
    with (
        store.lock("deploy 2.0.0"),
        pytest.raises(AnotherOperator, match=r"alice \(deploy 2\.0\.0"),
        store.lock("promote"),
    ):
        pass


def test_a_missing_and_a_broken_plan_raise_different_errors(store):
    with pytest.raises(NoPlan, match="gradserve up"):
        store.read()
    store.home.mkdir()
    store.path.write_text("{")
    with pytest.raises(PlanUnusable, match="history"):
        store.read()


def test_a_change_of_one_model_leaves_the_plans_of_the_others(store):
    photos = PlanStore(store.home, "photos")
    with store.lock("test"):
        store.write(PLAN, "first plan")
        assert not photos.serves_model()
        with pytest.raises(ModelNotPlanned, match=r"serves cifar10, not photos: add it with gradserve deploy"):
            photos.read()
        photos.write(PHOTOS, "add photos")
        store.write(replace(PLAN, retained=(OTHER,)), "more")
    assert (store.read().model, store.read().retained) == ("cifar10", (OTHER,))
    assert (photos.read().stable, photos.read().revision) == (PHOTOS.stable, 3)


def test_the_default_model_is_changed_and_another_one_removed(store):
    with store.lock("test"):
        store.write(PLAN, "first plan")
        PlanStore(store.home, "photos").write(PHOTOS, "add photos")
        with pytest.raises(ImpossibleMove, match="cifar10 is the default model"):
            store.remove_model("cifar10", "remove")
        store.set_default("photos")
        assert store.read().model == "photos"
        store.remove_model("cifar10", "remove")
        for unknown in (store.set_default, lambda name: store.remove_model(name, "remove")):
            with pytest.raises(ModelNotPlanned):
                unknown("cifar10")
    assert store.read_all().names() == ("photos",)
