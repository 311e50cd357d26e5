"""`promote --auto` with a gateway that serves a page of metrics: the verdict, the move and the audit line."""

import json

import pytest

from contracts.plan import Canary, Plan, Release
from control.errors import ImpossibleMove, MetricsUnreadable
from control.release.auto_promote import Window, promote_or_roll_back
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
    """`gateway(*pages)`: the address of a gateway that answers with these in turn, and then with the last.

    With a `key` it requires that key; `first` is called before the first answer.
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
    monkeypatch.chdir(tmp_path)  # no mlflow.db here
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", STABLE, canary=CANARY), "first")
    return store


def run_promotion(store, urls, version=None, key=None):
    lines = []
    rollout = Rollout(store, [], store.home, lines.append)
    window, limits = Window(urls, key, 0.5), Limits(requests=100)
    verdict, plan = promote_or_roll_back(rollout, store, version, window=window, limits=limits, say=lines.append)
    assert store.read() == plan
    return verdict, plan, "\n".join(lines)


def test_a_good_canary_is_promoted_and_the_reason_is_in_the_audit_log(store, gateway):
    two = [gateway(page(9000, 0, 500, 80), page(9000 + more, 0, 500 + more, 80)) for more in (300, 400)]
    verdict, plan, progress = run_promotion(store, two)
    assert (verdict.decision, plan.stable.version, plan.canary) == ("promote", "2.0", None)
    assert verdict.reasons[0].startswith("failed 0 of 700, stable 0 of 700")
    judged, moved = [json.loads(line) for line in store.audit_path.read_text().splitlines()][-2:]
    assert judged["verdict"]["decision"] == "promote"
    assert (moved["what"], moved["reason"]) == ("promote 2.0", verdict.reasons[0])
    assert verdict.reasons[0] in progress


def test_a_canary_that_fails_is_rolled_back(store, gateway):
    verdict, plan, _ = run_promotion(store, [gateway(page(0, 0, 0, 0), page(900, 0, 80, 40))])
    assert (verdict.decision, plan.stable.version, plan.canary) == ("rollback", "1.0", None)
    assert [release.version for release in plan.retained] == ["2.0"]


def test_too_few_requests_leave_the_plan_as_it_is(store, gateway):
    before = store.read()
    verdict, plan, _ = run_promotion(store, [gateway(page(0, 0, 0, 0), page(900, 0, 0, 99))])
    assert (verdict.decision, plan) == ("none", before)


def test_a_restarted_gateway_gives_no_verdict(store, gateway):
    verdict, _, _ = run_promotion(store, [gateway(page(900, 0, 900, 0), page(10, 0, 10, 0))])
    assert verdict.decision == "none"
    assert "was restarted" in verdict.reasons[0]


def test_a_change_of_the_plan_meanwhile_gives_no_verdict(store, gateway):
    def interfere():
        with store.lock("another"):
            store.write(Plan(0, "m", STABLE, retained=(Release("2.0", "m-2.0.mar", "b" * 64, 1),)), "another")

    url = gateway(page(0, 0, 0, 0), page(900, 0, 900, 0), first=interfere)
    lines = []
    verdict, _ = promote_or_roll_back(
        Rollout(store, [], store.home, lines.append), store, None,
        window=Window([url], None, 0.5), limits=Limits(requests=100), say=lines.append,
    )  # fmt: skip
    assert "the plan was changed" in verdict.reasons[0]
    assert store.read().canary is None


def test_unreadable_metrics_and_another_version_are_refused_without_a_change(store, gateway):
    before = store.read()
    asking = gateway(page(0, 0, 0, 0), key="secret")
    with pytest.raises(MetricsUnreadable, match="GRADSERVE_KEY"):
        run_promotion(store, [asking])
    with pytest.raises(MetricsUnreadable, match="does not answer"):
        run_promotion(store, ["http://127.0.0.1:9"])
    with pytest.raises(MetricsUnreadable, match="does not answer with metrics"):
        run_promotion(store, [gateway("<html>")])
    with pytest.raises(ImpossibleMove, match=r"3\.0 is not on trial, 2\.0 is"):
        run_promotion(store, [asking], version="3.0")
    assert store.read() == before
    assert run_promotion(store, [asking], key="secret")[0].decision == "none"
