"""Rollouts with agents that serve a status page: no version gets traffic that it cannot take."""

import json
import threading
import time
from dataclasses import replace

import pytest

from contracts import status as agent_status
from contracts.plan import Plan, Release
from contracts.status import AgentStatus, Pool, ServerStatus, VersionStatus
from control.archive import file_sha256
from control.errors import ArchiveError, ImpossibleMove, NoAgentAnswers, NotFollowed, Refused
from control.release.plan_folder import write_atomically
from control.release.plan_store import PlanStore
from control.release.rollout import Rollout

DEAD = "http://127.0.0.1:9"


@pytest.fixture
def releases(tmp_path, write_archive):
    """The releases 1.0, 2.0 and 3.0, whose archives are in the model store."""
    paths = [write_archive(tmp_path / f"m-{version}.mar", version=version) for version in ("1.0", "2.0", "3.0")]
    return [Release(path.stem.removeprefix("m-"), path.name, file_sha256(path), 1) for path in paths]


@pytest.fixture
def store(tmp_path, monkeypatch, releases):
    """The plan, beside the archives: 1.0 is stable and 2.0 is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, (stable, loaded, _) = PlanStore(tmp_path), releases
    with store.lock("test"):
        store.write(Plan(0, "m", stable, retained=(loaded,)), "first")
    return store


@pytest.fixture
def agent(store, serve):
    """`agent(states)`: the address of an agent that follows the plan and has the versions in these states."""

    def agent(states):
        def answer(_):
            versions = tuple(
                VersionStatus(
                    "m",
                    version,
                    "retained",
                    state,
                    routable=state == "ready",
                    predict=Pool(int(state == "ready"), 1),
                    explain=Pool(),
                    reason="it crashed" if state == "failed" else None,
                )
                for version, state in states.items()
            )
            server = ServerStatus("running", 0, "http://torchserve:8080")
            revision = store.read().revision
            status = AgentStatus(
                time.time(), draining=False, torchserve=server, versions=versions, plan_revision=revision
            )
            return 200, json.dumps(agent_status.dump(status)).encode()

        return serve(answer)

    return agent


def rollout(store, *agents):
    return Rollout(store, agents, store.home, lambda line: None)


def test_promotion_and_rollback_refuse_a_version_that_an_agent_gave_up(store, agent):
    states = {"1.0": "ready", "2.0": "failed"}
    moving = rollout(store, agent(states), agent({"1.0": "ready", "2.0": "ready"}))
    with pytest.raises(Refused, match="it crashed"):
        moving.promote("2.0")
    assert store.read().stable.version == "1.0"
    states["2.0"] = "ready"
    assert moving.promote("2.0").stable.version == "2.0"
    states["1.0"] = "failed"
    with pytest.raises(Refused, match="it crashed"):
        moving.rollback()
    assert store.read().stable.version == "2.0"


def test_promotion_waits_until_every_agent_has_a_worker_ready(store, agent, monkeypatch):
    states = {"1.0": "ready", "2.0": "loading"}
    began = time.monotonic()
    threading.Timer(0.5, states.update, kwargs={"2.0": "ready"}).start()
    monkeypatch.setattr("control.release.rollout.REPORT_EVERY_S", 0.1)
    url, lines = agent(states), []
    assert Rollout(store, [url], store.home, lines.append).promote("2.0").stable.version == "2.0"
    assert time.monotonic() - began >= 0.5
    assert lines.count(f"2.0 ready: still waiting, because {url} is not done yet") == 1, (
        "an agent that answers is named once"
    )


def test_an_agent_that_is_down_delays_a_promotion_but_no_rollback(store, agent, monkeypatch):
    monkeypatch.setattr("control.release.rollout.LOAD_WITHIN_S", 0.3)
    there, lines = agent({"1.0": "ready", "2.0": "ready"}), []
    rollout(store, there).promote("2.0")
    both = Rollout(store, [there, "http://127.0.0.1:9"], store.home, lines.append)
    began = time.monotonic()
    assert both.rollback().stable.version == "1.0"
    assert time.monotonic() - began < 2
    assert any("http://127.0.0.1:9 does not answer" in line for line in lines)
    with pytest.raises(NotFollowed, match="The plan stays in force"):
        both.promote("2.0")


def test_a_deploy_names_the_dead_agent_that_it_waits_for(store, agent, monkeypatch):
    monkeypatch.setattr("control.release.rollout.REPORT_EVERY_S", 0.2)
    monkeypatch.setattr("control.release.rollout.LOAD_WITHIN_S", 1.5)
    lines = []
    both = Rollout(store, [agent({"1.0": "ready", "2.0": "ready"}), DEAD], store.home, lines.append)
    with pytest.raises(Refused, match=f"{DEAD} does not answer"):
        both.deploy("2.0", share=10)
    named = [line for line in lines if "still waiting" in line]
    assert 2 <= len(named) <= 8, "every 0.2 s, not at each poll"
    assert all(line.startswith(f"load 2.0: still waiting, because {DEAD} does not answer") for line in named)


def test_with_allow_missing_the_agents_that_answer_are_enough(store, agent, monkeypatch, releases):
    monkeypatch.setattr("control.release.rollout.MISSING_AFTER_S", 0.3)
    there, lines = agent({"1.0": "ready", "2.0": "ready"}), []

    def moving():
        return Rollout(store, [DEAD, there], store.home, lines.append, allow_missing=True)

    assert moving().deploy("2.0", share=10).canary.version == "2.0"
    assert lines.count(f"WARNING: {DEAD} does not answer: left out; it follows the plan when it is back") == 1
    assert moving().promote().stable.version == "2.0"
    old, new, _ = releases
    with store.lock("test"):
        store.write(Plan(0, "m", new, previous=(old,)), "nothing is retained")
    assert moving().rollback().stable == old, "the agent that answers loaded it again"


def test_allow_missing_needs_at_least_one_agent(store, monkeypatch):
    monkeypatch.setattr("control.release.rollout.MISSING_AFTER_S", 0.3)
    before = store.read()
    alone = Rollout(store, [DEAD], store.home, lambda _: None, allow_missing=True)
    with pytest.raises(Refused, match="no agent answers"):
        alone.deploy("3.0", share=10)
    assert store.read().releases() == before.releases()
    with pytest.raises(NoAgentAnswers, match=DEAD):
        alone.promote("2.0")
    assert store.read().stable.version == "1.0"


def test_an_agent_that_loads_slowly_is_not_left_out(store, agent, monkeypatch):
    monkeypatch.setattr("control.release.rollout.MISSING_AFTER_S", 0.2)
    slow = {"1.0": "ready", "2.0": "loading"}
    threading.Timer(0.7, slow.update, kwargs={"2.0": "failed"}).start()
    moving = Rollout(
        store, [agent({"1.0": "ready", "2.0": "ready"}), agent(slow)], store.home, lambda _: None, allow_missing=True
    )
    with pytest.raises(Refused, match="it crashed"):
        moving.promote("2.0")


def test_a_canary_keeps_its_callers_and_traffic_while_its_share_grows(store, agent):
    moving = rollout(store, agent({"1.0": "ready", "2.0": "ready"}))
    first = moving.deploy("2.0", share=10)
    second = moving.deploy("2.0", share=50)
    assert (second.canary.share, second.canary.salt) == (50, first.canary.salt)
    assert second.revision == first.revision + 1, "no plan without it in between"
    assert moving.deploy("2.0").canary is None, "without a role it gets no traffic"


def test_a_known_version_that_is_refused_stays_in_the_plan(store, agent):
    states = {"1.0": "ready", "2.0": "ready"}
    moving = rollout(store, agent(states))
    before = moving.deploy("2.0", share=10)
    states["2.0"] = "failed"
    with pytest.raises(Refused, match="it crashed"):
        moving.deploy("2.0", share=50)
    assert store.read() == before


def test_a_new_version_that_is_refused_leaves_the_plan(store, agent):
    with pytest.raises(Refused, match="it crashed"):
        rollout(store, agent({"1.0": "ready", "3.0": "failed"})).deploy("3.0", share=10)
    assert [release.version for release in store.read().releases()] == ["1.0", "2.0"]


def test_a_rollback_without_a_previous_version_is_refused(store, agent):
    with pytest.raises(ImpossibleMove, match="no stable version before"):
        rollout(store, agent({})).rollback()


def test_a_second_rollback_does_not_return_to_the_version_that_was_left(store, agent):
    moving = rollout(store, agent({"1.0": "ready", "2.0": "ready"}))
    moving.promote("2.0")
    assert moving.rollback().stable.version == "1.0"
    with pytest.raises(ImpossibleMove, match="no stable version before"):
        moving.rollback()
    assert store.read().stable.version == "1.0"


def test_a_rollback_ignores_a_promotion_that_was_not_written(store, agent, monkeypatch, releases):
    """The plan cannot be written, as on a full disk."""
    moving = rollout(store, agent({"1.0": "ready", "2.0": "ready", "3.0": "ready"}))
    moving.promote("2.0")
    with store.lock("test"):
        plan = store.read()
        store.write(replace(plan, retained=(*plan.retained, releases[2])), "3.0 loaded")

    def full_disk(path, text, write=write_atomically):
        if path == store.path:
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patched:
        patched.setattr("control.release.plan_folder.write_atomically", full_disk)
        with pytest.raises(OSError, match="No space"):
            moving.promote("3.0")
    assert moving.rollback().stable.version == "1.0", "3.0 never was stable"


def test_a_rollback_loads_a_version_that_was_packed_again_with_its_new_hash(store, agent, tmp_path, write_archive):
    moving, lines = rollout(store, agent({"2.0": "ready"})), []
    both = agent({"1.0": "ready", "2.0": "ready"})
    Rollout(store, [both], store.home, lines.append).promote("2.0")
    moving.retire("1.0")
    first = write_archive(tmp_path / "m-1.0.mar", version="1.0", comment=b"packed again")
    first.with_name("m-1.0.mar.sha256").write_text(f"{file_sha256(first)}  m-1.0.mar\n")
    back = Rollout(store, [both], store.home, lines.append).rollback()
    assert (back.stable.version, back.stable.sha256) == ("1.0", file_sha256(first))
    assert any("packed again" in line for line in lines)


def test_a_rollback_refuses_changed_bytes_without_a_checksum(store, agent, tmp_path, write_archive):
    both = agent({"1.0": "ready", "2.0": "ready"})
    rollout(store, both).promote("2.0")
    rollout(store, agent({"2.0": "ready"})).retire("1.0")
    write_archive(tmp_path / "m-1.0.mar", version="1.0", comment=b"changed")
    before = store.read()
    with pytest.raises(ArchiveError, match="its SHA-256 is"):
        rollout(store, both).rollback()
    assert store.read() == before
