"""The plan in a ConfigMap: compare-and-set, a bounded history, errors with a remedy."""

import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from contracts import plan as traffic_plan
from control.errors import BadSetting, ClusterUnusable, NoPlan, PlanChanged, PlanUnusable
from control.release import plan_config_map
from control.release.plan_config_map import PlanConfigMap, bound_history
from control.release.plan_store import PlanStore, open_store
from gateway.kubernetes.addresses import PlanObject

PLAN = traffic_plan.Plan(0, "cifar10", traffic_plan.Release("1.0.0", "cifar10-1.0.0.mar", "a" * 64))
PHOTOS = traffic_plan.Plan(0, "photos", traffic_plan.Release("1.0.0", "photos-1.0.0.mar", "c" * 64))
OTHER = traffic_plan.Release("2.0.0", "cifar10-2.0.0.mar", "b" * 64)


@pytest.fixture
def make_store(cluster, tmp_path):
    def make(model=None):
        return PlanStore(tmp_path, model, backend=PlanConfigMap(cluster.api(), PlanObject("default", "plan")))

    return make


def test_each_change_is_a_revision_with_history_and_an_audit_line(make_store, cluster, monkeypatch):
    monkeypatch.setenv("GRADSERVE_OPERATOR", "alice")
    store = make_store()
    with pytest.raises(NoPlan, match="gradserve deploy"):
        store.read()
    assert not store.exists()
    with store.lock("test"):
        store.write(PLAN, "first plan")
        store.write(replace(PLAN, retained=(OTHER,)), "again", reason="because")
    assert (store.read().revision, store.read().retained) == (2, (OTHER,))
    history = cluster.objects["plan-history"]["data"]
    assert sorted(history) == ["audit.jsonl", "plan-000001.json", "plan-000002.json"]
    first, second = map(json.loads, history["audit.jsonl"].splitlines())
    assert (first["who"], first["what"], first["before"]) == ("alice", "first plan", None)
    assert (second["before"]["revision"], second["after"]["revision"], second["reason"]) == (1, 2, "because")


def test_a_stale_write_is_refused_and_changes_nothing(make_store):
    store, other = make_store(), make_store()
    with store.lock("first"):
        store.write(PLAN, "first plan")
    with store.lock("deploy"):
        plan = store.read()
        with other.lock("deploy too"):
            other.write(replace(other.read(), retained=(OTHER,)), "theirs")
        with pytest.raises(PlanChanged, match=r"another operator changed the plan kubernetes:default/plan.*again"):
            store.write(replace(plan, previous=(OTHER,)), "ours")
    assert (store.read().revision, store.read().retained, store.read().previous) == (2, (OTHER,), ())
    with store.lock("again"):
        assert store.write(store.read(), "ours").revision == 3


def test_two_first_plans_do_not_overwrite_each_other(make_store):
    store, other = make_store(), make_store()
    with store.lock("first"):
        assert not store.exists()
        with other.lock("first too"):
            other.write(PHOTOS, "theirs")
        with pytest.raises(PlanChanged):
            store.write(PLAN, "ours")
    assert store.read().model == "photos"


def test_a_plan_of_another_model_stays(make_store):
    store, photos = make_store(), make_store("photos")
    with store.lock("first"):
        store.write(PLAN, "first plan")
    with photos.lock("add"):
        photos.write(PHOTOS, "add photos")
    assert store.read_all().names() == ("cifar10", "photos")


def test_foreign_keys_and_labels_of_the_config_map_stay(make_store, cluster):
    store = make_store()
    with store.lock("first"):
        store.write(PLAN, "first plan")
    cluster.objects["plan"]["metadata"]["labels"] = {"team": "vision"}
    cluster.objects["plan"]["data"]["note"] = "ours"
    with store.lock("second"):
        store.write(PLAN, "again")
    assert cluster.objects["plan"]["metadata"]["labels"] == {"team": "vision"}
    assert cluster.objects["plan"]["data"]["note"] == "ours"


def test_a_revision_is_not_used_again_after_the_plan_was_deleted(make_store, cluster):
    store = make_store()
    with store.lock("first"):
        store.write(PLAN, "first plan")
    cluster.delete("plan")
    with store.lock("again"):
        assert store.write(PLAN, "again").revision == 2


def test_a_history_that_others_change_meanwhile_is_written_again(make_store, cluster):
    store, answer = make_store(), cluster.put
    with store.lock("first"):
        store.write(PLAN, "first plan")
    backend = PlanConfigMap(cluster.api(), PlanObject("default", "plan"))
    lost = iter([True, False])

    def note_meanwhile(data):
        data["audit.jsonl"] += "ours\n"
        if next(lost):
            found = cluster.objects["plan-history"]
            answer({**found, "data": {**found["data"], "audit.jsonl": found["data"]["audit.jsonl"] + "theirs\n"}})

    backend._change_history(note_meanwhile)
    assert cluster.objects["plan-history"]["data"]["audit.jsonl"].endswith("theirs\nours\n")


def test_the_history_is_bounded_by_revisions_lines_and_bytes(monkeypatch):
    data = {f"plan-{number:06d}.json": "x" * 10 for number in range(1, 31)}
    data["audit.jsonl"] = "".join(f"{number}\n" for number in range(500))
    bound_history(data)
    assert sorted(key for key in data if key != "audit.jsonl") == [f"plan-{n:06d}.json" for n in range(11, 31)]
    assert data["audit.jsonl"].splitlines()[0] == "300"
    monkeypatch.setattr(plan_config_map, "MOST_HISTORY_BYTES", 105)
    bound_history(data)
    assert (len(data), data["audit.jsonl"]) == (11, "499\n")
    assert sum(map(len, data.values())) <= 105


def test_a_broken_plan_names_the_history(make_store, cluster):
    cluster.put_text("plan", "{")
    with pytest.raises(PlanUnusable, match="ConfigMap plan-history"):
        make_store().read()


def test_a_server_that_is_away_or_refuses_is_named(make_store, cluster):
    cluster.fail = httpx.ConnectError("refused")
    with pytest.raises(ClusterUnusable, match="gives no answer"):
        make_store().read()
    cluster.fail = 403
    with pytest.raises(ClusterUnusable, match="service account the right"), make_store().lock("x"):
        make_store().write(PLAN, "x")


def test_operators_commands_open_the_store_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.delenv("GRADSERVE_KUBERNETES_API", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("GRADSERVE_PLAN", raising=False)
    assert not open_store(tmp_path).exists()
    monkeypatch.setenv("GRADSERVE_PLAN", "kubernetes:default/plan")
    with pytest.raises(ClusterUnusable, match="GRADSERVE_KUBERNETES_API"):
        open_store(tmp_path)
    for wrong in ("kubernetes:default/", str(Path("plan.json"))):
        monkeypatch.setenv("GRADSERVE_PLAN", wrong)
        with pytest.raises(BadSetting, match="GRADSERVE_PLAN"):
            open_store(tmp_path)
    monkeypatch.setenv("GRADSERVE_PLAN", "kubernetes:default/plan")
    monkeypatch.setenv("GRADSERVE_KUBERNETES_API", "http://127.0.0.1:1")
    with pytest.raises(ClusterUnusable, match=r"http://127\.0\.0\.1:1 gives no answer"):
        open_store(tmp_path).read()
