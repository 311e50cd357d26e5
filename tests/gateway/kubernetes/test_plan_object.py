"""The plan in a ConfigMap, followed by watch."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from contracts import plan as traffic_plan
from contracts.watched_file import WatchedFile
from gateway.kubernetes import watch
from gateway.kubernetes.addresses import PlanObject
from gateway.kubernetes.plan_object import WatchedPlan, watch_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import FakeKubernetes

RELEASE = traffic_plan.Release("1.0.0", "cifar10-1.0.0.mar", "a" * 64)


def plan_text(revision: int) -> str:
    plan = traffic_plan.Plan(revision, "cifar10", RELEASE)
    return json.dumps(traffic_plan.dump(traffic_plan.Plans(revision, "cifar10", (plan,))))


@pytest.fixture
def watched(cluster: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedPlan]:
    monkeypatch.setattr(watch, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(watch, "BACKOFF_MOST_S", 0.05)
    watched = WatchedPlan(cluster.api(), PlanObject("default", "plan"))
    yield watched
    watched.close()
    cluster.end_watches()
    if watched._thread is not None:
        watched._thread.join(5)
        assert not watched._thread.is_alive()


def wait_for(watched: WatchedPlan, is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not is_true():
        assert time.monotonic() < end, (watched.content, watched.error)
        watched.refresh()
        time.sleep(0.005)


def revision(watched: WatchedPlan) -> int | None:
    return watched.content.revision if watched.content is not None else None


def test_changes_are_followed_within_a_second(cluster: FakeKubernetes, watched: WatchedPlan) -> None:
    cluster.put_text("plan", plan_text(1))
    wait_for(watched, lambda: revision(watched) == 1)
    assert watched.error is None
    began = time.monotonic()
    cluster.put_text("plan", plan_text(2))
    wait_for(watched, lambda: revision(watched) == 2)
    assert time.monotonic() - began < 1
    assert not watched.refresh()


def test_a_plan_that_comes_later_is_found(cluster: FakeKubernetes, watched: WatchedPlan) -> None:
    wait_for(watched, lambda: watched.error == "there is no ConfigMap kubernetes:default/plan")
    cluster.put_text("plan", plan_text(1))
    wait_for(watched, lambda: revision(watched) == 1 and watched.error is None)


def test_a_broken_or_deleted_plan_leaves_the_last_good_one(cluster: FakeKubernetes, watched: WatchedPlan) -> None:
    cluster.put_text("plan", plan_text(1))
    wait_for(watched, lambda: revision(watched) == 1)
    cluster.put_text("plan", "{")
    wait_for(watched, lambda: "plan is no JSON" in (watched.error or ""))
    cluster.delete("plan")
    wait_for(watched, lambda: "there is no ConfigMap" in (watched.error or ""))
    assert revision(watched) == 1


@pytest.mark.parametrize("failure", [503, 403, httpx.ConnectError("refused")])
def test_the_last_good_plan_stays_while_the_server_is_away(
    cluster: FakeKubernetes, watched: WatchedPlan, failure: int | Exception
) -> None:
    cluster.put_text("plan", plan_text(1))
    wait_for(watched, lambda: revision(watched) == 1)
    cluster.fail = failure
    cluster.end_watches()
    wait_for(watched, lambda: "cannot be followed" in (watched.error or ""))
    assert revision(watched) == 1
    cluster.put_text("plan", plan_text(2))
    cluster.fail = None
    wait_for(watched, lambda: revision(watched) == 2 and watched.error is None)


def test_an_ended_watch_goes_on_from_the_last_bookmark(cluster: FakeKubernetes, watched: WatchedPlan) -> None:
    cluster.put_text("plan", plan_text(1))
    wait_for(watched, lambda: revision(watched) == 1)
    cluster.bookmark()
    wait_for(watched, lambda: ("WATCH", "") in cluster.calls)
    cluster.end_watches()
    wait_for(watched, lambda: cluster.calls.count(("WATCH", "")) >= 2)
    cluster.put_text("plan", plan_text(2))
    wait_for(watched, lambda: revision(watched) == 2)
    assert cluster.calls.count(("GET", "")) == 1


def test_a_version_that_is_too_old_is_listed_again(cluster: FakeKubernetes, watched: WatchedPlan) -> None:
    cluster.put_text("plan", plan_text(1))
    wait_for(watched, lambda: revision(watched) == 1 and ("WATCH", "") in cluster.calls)
    cluster.oldest = cluster.version + 1
    cluster.end_watches()
    wait_for(watched, lambda: cluster.calls.count(("GET", "")) >= 2)
    cluster.put_text("plan", plan_text(2))
    wait_for(watched, lambda: revision(watched) == 2)


def test_a_path_is_watched_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text(3))
    watched = watch_plan(path, missing="none")
    assert isinstance(watched, WatchedFile)
    assert watched.refresh()
    assert watched.content is not None
    assert watched.content.revision == 3


def test_a_fifth_change_hides_no_plan_behind_an_error(cluster: FakeKubernetes) -> None:
    watched = WatchedPlan(cluster.api(), PlanObject("default", "plan"))
    watched._report({"metadata": {}, "data": {"plan.json": plan_text(4)}}, None)
    watched._report(None, "gone")
    watched._thread = object()  # type: ignore[assignment]
    assert watched.refresh()
    assert (revision(watched), watched.error) == (4, "gone")
