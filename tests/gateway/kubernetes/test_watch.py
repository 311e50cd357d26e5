"""Objects of Kubernetes are listed once and then watched; whatever happens, the following goes on."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.kubernetes import watch
from gateway.kubernetes.api import config_maps, named
from gateway.kubernetes.watch import follow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import FakeKubernetes

    from gateway.kubernetes.api import KubernetesApi

    Reports = list[tuple[dict[str, Any] | None, str | None]]

SELECTOR = {"labelSelector": "app=a"}


def new(name: str, text: str = "", app: str = "a") -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"app": app}}, "data": {"text": text}}


@contextmanager
def following(cluster: FakeKubernetes, api: KubernetesApi, selector: dict[str, str]) -> Iterator[Reports]:
    reports: Reports = []
    stop = threading.Event()
    how = (api, config_maps("default"), selector, lambda *report: reports.append(report), stop)
    thread = threading.Thread(target=follow, args=how)
    thread.start()
    try:
        yield reports
    finally:
        stop.set()
        cluster.fail = None
        wait_for(partial(end_watches, cluster, thread))


def end_watches(cluster: FakeKubernetes, follower: threading.Thread) -> bool:
    """End the watches, also one that began since the last call, and return True if the follower has ended."""
    cluster.end_watches()
    return not follower.is_alive()


@pytest.fixture(autouse=True)
def _without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(watch, "BACKOFF_MOST_S", 0.05)


def wait_for(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def texts(reports: Reports) -> dict[str, str]:
    objects = next((objects for objects, _ in reversed(reports) if objects is not None), {})
    return {name: manifest["data"]["text"] for name, manifest in objects.items()}


def test_all_selected_objects_are_reported_at_each_change(cluster: FakeKubernetes) -> None:
    cluster.put(new("one", "1"))
    cluster.put(new("other", "1", app="b"))
    with following(cluster, cluster.api(), SELECTOR) as reports:
        wait_for(lambda: texts(reports) == {"one": "1"})
        cluster.put(new("two", "2"))
        wait_for(lambda: texts(reports) == {"one": "1", "two": "2"})
        cluster.put(new("one", "3"))
        cluster.bookmark()
        wait_for(lambda: texts(reports) == {"one": "3", "two": "2"})
        cluster.delete("one")
        wait_for(lambda: texts(reports) == {"two": "2"})
        assert cluster.calls.count(("GET", "")) == 1
        assert len(reports) == 4, "a bookmark is no change"
        assert {error for _, error in reports} == {None}


@pytest.mark.parametrize("failure", [500, httpx.ConnectError("refused"), RuntimeError("a fault of our own")])
def test_after_an_error_the_objects_are_listed_again(cluster: FakeKubernetes, failure: int | Exception) -> None:
    cluster.put(new("one", "1"))
    with following(cluster, cluster.api(), named("one")) as reports:
        wait_for(lambda: texts(reports) == {"one": "1"})
        cluster.fail = failure
        cluster.end_watches()
        wait_for(lambda: reports[-1][0] is None)
        assert reports[-1][1]
        cluster.put(new("one", "2"))
        cluster.fail = None
        wait_for(lambda: texts(reports) == {"one": "2"} and reports[-1][1] is None)


def test_a_watch_from_too_old_a_version_is_no_error(cluster: FakeKubernetes) -> None:
    cluster.put(new("one", "1"))
    with following(cluster, cluster.api(), named("one")) as reports:
        wait_for(lambda: ("WATCH", "") in cluster.calls)
        cluster.oldest = cluster.version + 1
        cluster.end_watches()
        wait_for(lambda: cluster.calls.count(("GET", "")) >= 2)
        assert {error for _, error in reports} == {None}
