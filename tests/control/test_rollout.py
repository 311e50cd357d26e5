"""Moves of versions against agents that are pages of status: nothing is routed to what cannot take it."""

import json
import threading
import time

import pytest

from control.errors import ImpossibleMove, NotFollowed, Refused
from control.releases import PlanStore
from control.rollout import Rollout
from gateway.traffic import Plan, Release

OLD, NEW = (Release(version, f"m-{version}.mar", version[0] * 64, 1) for version in ("1.0", "2.0"))


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = PlanStore(tmp_path)
    with store.lock("test"):
        store.write(Plan(0, "m", OLD, retained=(NEW,)), "first")
    return store


@pytest.fixture
def agent(store, serve):
    """`agent(states)`: the address of one that follows the plan, where the versions are in these states."""

    def agent(states):
        def answer(_):
            versions = [
                {
                    "version": version,
                    "state": state,
                    "routable": state == "ready",
                    "reason": "it crashed" if state == "failed" else None,
                    "predict": {"ready": int(state == "ready"), "wanted": 1},
                }
                for version, state in states.items()
            ]
            page = {"observed_at": time.time(), "plan_revision": store.read().revision, "versions": versions}
            return 200, json.dumps(page).encode()

        return serve(answer)

    return agent


def rollout(store, *agents):
    return Rollout(store, agents, store.home, lambda line: None)


def test_a_version_that_an_agent_has_given_up_is_neither_promoted_nor_rolled_back_to(store, agent):
    states = {"1.0": "ready", "2.0": "failed"}
    moving = rollout(store, agent(states), agent({"1.0": "ready", "2.0": "ready"}))
    with pytest.raises(Refused, match="it crashed"):
        moving.promote("2.0")
    assert store.read().stable == OLD
    states["2.0"] = "ready"
    assert moving.promote("2.0").stable == NEW
    states["1.0"] = "failed"
    with pytest.raises(Refused, match="it crashed"):
        moving.rollback()
    assert store.read().stable == NEW


def test_promotion_waits_until_every_agent_has_a_worker_ready(store, agent):
    states = {"1.0": "ready", "2.0": "loading"}
    threading.Timer(0.5, states.update, kwargs={"2.0": "ready"}).start()
    began = time.monotonic()
    assert rollout(store, agent(states)).promote("2.0").stable == NEW
    assert time.monotonic() - began >= 0.5


def test_a_roll_back_is_written_though_an_agent_is_down(store, agent, monkeypatch):
    monkeypatch.setattr("control.rollout.FOLLOW_WITHIN_S", 0.3)
    there = agent({"1.0": "ready", "2.0": "ready"})
    rollout(store, there).promote("2.0")
    began = time.monotonic()
    with pytest.raises(NotFollowed, match="The plan stands"):
        rollout(store, there, "http://127.0.0.1:9").rollback()
    assert store.read().stable == OLD
    assert time.monotonic() - began < 2


def test_without_a_version_of_before_there_is_no_way_back(store, agent):
    with pytest.raises(ImpossibleMove, match="none to go back to"):
        rollout(store, agent({})).rollback()
