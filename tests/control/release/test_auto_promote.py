"""`promote --auto` against a gateway that is a page of metrics: what is decided, done and written down."""

import json

import pytest

from contracts.plan import Canary, Plan, Release
from control.errors import ImpossibleMove, MetricsUnreadable
from control.release.auto_promote import Window, settle
from control.release.plan_store import PlanStore
from control.release.rollout import Rollout
from control.release.verdict import Limits

STABLE = Release("1.0", "m-1.0.mar", "a" * 64, 1)
CANARY = Canary("2.0", "m-2.0.mar", "b" * 64, 1, share=10)


def page(stable, failed, canary, canary_failed):
    outcomes = {"1.0": {"ok": stable, "handler_failed": failed}, "2.0": {"ok": canary, "handler_failed": canary_failed}}
    return "".join(
        f'gateway_version_requests_total{{version="{version}",kind="predict",outcome="{outcome}"}} {count}\n'
        for version, counts in outcomes.items()
        for outcome, count in counts.items()
    )


@pytest.fixture
def gateway(serve):
    """`gateway(*pages)`: the address of one that answers with these in turn, and then with the last.

    With a `key` it asks for that; `first` is called before the first answer.
    """

    def gateway(*pages, key=None, first=lambda: None):
        left = list(pages)

        def answer(headers):
            if key is not None and headers["authorization"] != f"Bearer {key}":
                return 401, b""
            if len(left) == len(pages):
                first()
            return 200, (left.pop(0) if len(left) > 1 else left[0]).encode()

        return serve(answer)

    return gateway


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from anybody's MLflow store
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", STABLE, canary=CANARY), "first")
    return store


def settled(store, urls, version=None, key=None):
    said = []
    rollout = Rollout(store, [], store.home, said.append)
    window, limits = Window(urls, key, 0.5), Limits(requests=100)
    verdict, plan = settle(rollout, store, version, window=window, limits=limits, say=said.append)
    assert store.read() == plan
    return verdict, plan, "\n".join(said)


def test_a_canary_that_does_well_is_promoted_and_the_reason_stands_in_the_audit_log(store, gateway):
    two = [gateway(page(9000, 0, 500, 80), page(9000 + more, 0, 500 + more, 80)) for more in (300, 400)]
    verdict, plan, said = settled(store, two)
    assert (verdict.decision, plan.stable.version, plan.canary) == ("promote", "2.0", None)
    assert verdict.reasons[0].startswith("failed 0 of 700, stable 0 of 700")
    judged, moved = [json.loads(line) for line in store.audit_path.read_text().splitlines()][-2:]
    assert judged["verdict"]["decision"] == "promote"
    assert (moved["what"], moved["reason"]) == ("promote 2.0", verdict.reasons[0])
    assert verdict.reasons[0] in said


def test_a_canary_that_fails_is_rolled_back(store, gateway):
    verdict, plan, _ = settled(store, [gateway(page(0, 0, 0, 0), page(900, 0, 80, 40))])
    assert (verdict.decision, plan.stable.version, plan.canary) == ("rollback", "1.0", None)
    assert [release.version for release in plan.retained] == ["2.0"]


def test_without_enough_requests_the_plan_stays(store, gateway):
    before = store.read()
    verdict, plan, _ = settled(store, [gateway(page(0, 0, 0, 0), page(900, 0, 0, 99))])
    assert (verdict.decision, plan) == ("none", before)


def test_a_restarted_gateway_leaves_no_verdict(store, gateway):
    verdict, _, _ = settled(store, [gateway(page(900, 0, 900, 0), page(10, 0, 10, 0))])
    assert verdict.decision == "none"
    assert "started anew" in verdict.reasons[0]


def test_a_plan_that_somebody_changes_meanwhile_leaves_no_verdict(store, gateway):
    def interfere():
        with store.lock("another"):
            store.write(Plan(0, "m", STABLE, retained=(Release("2.0", "m-2.0.mar", "b" * 64, 1),)), "another")

    url = gateway(page(0, 0, 0, 0), page(900, 0, 900, 0), first=interfere)
    said = []
    verdict, _ = settle(
        Rollout(store, [], store.home, said.append), store, None,
        window=Window([url], None, 0.5), limits=Limits(requests=100), say=said.append,
    )  # fmt: skip
    assert "the plan was changed" in verdict.reasons[0]
    assert store.read().canary is None


def test_what_cannot_be_judged_is_told_before_anything_is_done(store, gateway):
    before = store.read()
    asking = gateway(page(0, 0, 0, 0), key="secret")
    with pytest.raises(MetricsUnreadable, match="GRADSERVE_KEY"):
        settled(store, [asking])
    with pytest.raises(MetricsUnreadable, match="does not answer"):
        settled(store, ["http://127.0.0.1:9"])
    with pytest.raises(MetricsUnreadable, match="something else than metrics"):
        settled(store, [gateway("<html>")])
    with pytest.raises(ImpossibleMove, match=r"3\.0 is not on trial, 2\.0 is"):
        settled(store, [asking], version="3.0")
    assert store.read() == before
    assert settled(store, [asking], key="secret")[0].decision == "none"
