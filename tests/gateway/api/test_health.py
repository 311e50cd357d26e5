"""The health report follows the agents' statuses; an old status counts as missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand


def ready(stand: Stand) -> bool:
    return stand.client.get("/readyz").status_code == 200


def health(stand: Stand) -> tuple[int, str, list[str]]:
    answer = stand.client.get("/health")
    data = answer.json()
    return answer.status_code, data["status"], data["reasons"]


def test_health_is_ok_if_nothing_is_wrong(stand: Stand) -> None:
    assert ready(stand)
    assert health(stand) == (200, "ok", [])


def test_without_an_explain_worker_the_gateway_is_not_ready_and_predictions_go_on(stand: Stand) -> None:
    stand.agent.versions[0]["explain"] = {"ready": 0, "wanted": 1, "pending": 0, "capacity": 100}
    stand.wait_until(lambda: not ready(stand))
    assert health(stand) == (503, "unavailable", ["1.0.0: 0 of 1 explain workers are ready"])
    assert stand.client.post("/predict", content=b"x").status_code == 200
    refused = stand.client.post("/explain", content=b"x")
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")


def test_a_degraded_version_is_reported_though_all_its_workers_are_ready(stand: Stand) -> None:
    stand.agent.versions[0]["state"] = "degraded"
    stand.wait_until(lambda: health(stand) == (200, "degraded", ["1.0.0 is degraded"]))


def test_workers_on_the_fallback_engine_are_reported_and_counted(stand: Stand) -> None:
    pool = {"ready": 2, "wanted": 2, "fallback": 1, "pending": 0, "capacity": 100}
    stand.agent.versions[0].update(state="degraded", predict=pool)
    reasons = ["1.0.0: 1 of 2 predict workers run the fallback engine"]
    stand.wait_until(lambda: health(stand) == (200, "degraded", reasons))
    assert stand.client.get("/health").json()["versions"][0]["workers"]["predict"]["fallback"] == 1
    line = 'gateway_workers_fallback{kind="predict",model="cifar10",role="stable",version="1.0.0"} 1.0'
    assert line in stand.client.get("/metrics").text.splitlines()


def test_a_version_of_the_plan_that_no_agent_has_is_degraded(
    stand: Stand, make_plan: Callable[..., dict[str, Any]]
) -> None:
    canary = {"version": "2.0.0", "archive": "cifar10-2.0.0.mar", "sha256": "0" * 64, "workers": None, "share": 10}
    stand.plan.write_text(json.dumps(make_plan(revision=2, canary=canary)), encoding="utf-8")
    told = ["2.0.0 is in the plan, and no agent has it yet"]
    stand.wait_until(lambda: health(stand) == (200, "degraded", told))


def test_the_share_of_a_version_is_the_plans(stand: Stand, make_plan: Callable[..., dict[str, Any]]) -> None:
    canary = {"version": "2.0.0", "archive": "cifar10-2.0.0.mar", "sha256": "0" * 64, "workers": None, "share": 10}
    assert stand.client.get("/models").json()["versions"][0]["share"] == 100
    stand.plan.write_text(json.dumps(make_plan(revision=2, canary=canary)), encoding="utf-8")
    stand.wait_until(lambda: stand.client.get("/models").json()["versions"][0]["share"] == 90)


def test_an_agents_error_text_is_not_in_the_health_report(stand: Stand) -> None:
    stand.agent.versions[0].update(state="failed", reason="No such file: /run/gradserve/weights", routable=False)
    stand.wait_until(lambda: not ready(stand))
    for page in ("/health", "/models"):
        assert "/run/gradserve" not in stand.client.get(page).text


@pytest.mark.parametrize("change", [{"routable": False, "state": "loading"}, {"routable": False, "state": "failed"}])
def test_an_unverified_or_failed_stable_version_is_unavailable_until_it_is_back(
    stand: Stand, change: dict[str, Any]
) -> None:
    before = dict(stand.agent.versions[0])
    stand.agent.versions[0].update(change)
    stand.wait_until(lambda: not ready(stand))
    answer = stand.client.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["versions"][0]["state"] == change["state"]
    stand.agent.versions[0] = before
    stand.wait_until(lambda: ready(stand) and health(stand)[1] == "ok")


@pytest.mark.parametrize("failing", ["up", "observes"])
def test_an_agent_that_is_down_or_cannot_reach_torchserve_counts_as_missing(
    make_stand: Callable[..., Stand], failing: str
) -> None:
    stand = make_stand(status_max_age_s=0.3)
    setattr(stand.agent, failing, False)
    stand.wait_until(lambda: not ready(stand))
    assert health(stand)[1:] == ("unavailable", ["1 of 1 agents give no fresh status"])
    assert stand.client.get("/livez").status_code == 200
    setattr(stand.agent, failing, True)
    stand.wait_until(lambda: ready(stand))


def test_an_agent_that_lost_torchserve_before_the_gateway_started_counts_as_missing(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent]
) -> None:
    stand = make_stand(agent=make_agent(observes=False, observed_at=1.0))
    assert not ready(stand)


def test_an_agent_with_another_clock_counts_once_it_has_observed_torchserve_again(
    make_stand: Callable[..., Stand], make_agent: type[FakeAgent]
) -> None:
    agent = make_agent(observes=False, observed_at=1.0)
    stand = make_stand(agent=agent)
    agent.observed_at = 2.0
    stand.wait_until(lambda: ready(stand))


def test_a_draining_gateway_is_not_ready_but_answers_and_closes_connections(stand: Stand) -> None:
    stand.app.state.gateway.is_draining = True
    refused = stand.client.get("/readyz")
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    answer = stand.client.post("/predict", content=b"x")
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert stand.client.get("/v2/health/ready").status_code == 503


def test_without_a_plan_nothing_is_ready_and_health_says_why(stand: Stand) -> None:
    (status, name, reasons) = health(stand)
    assert (status, name, reasons) == (200, "ok", [])
    stand.plan.unlink()
    stand.wait_until(lambda: health(stand)[2] == ["there is no traffic plan"])
    assert ready(stand), "the last plan goes on"


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["torn", "nested"])
def test_a_broken_plan_leaves_the_last_one(stand: Stand, text: str) -> None:
    stand.plan.write_text(text, encoding="utf-8")
    stand.wait_until(lambda: health(stand)[1] == "degraded")
    assert "is no JSON" in health(stand)[2][0]
    assert "gateway_plan_broken 1.0" in stand.client.get("/metrics").text
    assert stand.client.post("/predict", content=b"x").status_code == 200


def test_a_new_plan_moves_the_traffic(
    stand: Stand, make_plan: Callable[..., dict[str, Any]], make_version: Callable[..., dict[str, Any]]
) -> None:
    stand.agent.versions.append(make_version("2.0.0", "canary"))
    stable = {"version": "2.0.0", "archive": "cifar10-2.0.0.mar", "sha256": "0" * 64, "workers": None}
    stand.plan.write_text(json.dumps(make_plan(revision=2, stable=stable)), encoding="utf-8")

    def version() -> str:
        return str(stand.client.post("/predict", content=b"x").json().get("model", {}).get("version"))

    stand.wait_until(lambda: version() == "2.0.0")
    # 1.0.0 is still loaded, but no longer in the plan: the agent may unregister it at any time.
    assert stand.client.post("/predict?version=1.0.0", content=b"x").json()["code"] == "version_unknown"


def test_models_lists_versions_and_contracts(stand: Stand) -> None:
    answer = stand.client.get("/models").json()
    assert answer["name"] == "cifar10"
    assert answer["versions"][0]["contract"]["classes"] == ["cat", "dog", "frog"]
    assert "http://" not in json.dumps(answer), "no private address"
