"""The client of the Kubernetes API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest

from gateway.kubernetes import api as kubernetes
from gateway.kubernetes.api import KubernetesApi, ServiceAccountToken, config_maps, connect
from gateway.kubernetes.errors import ApiRefused, Conflict, Expired, NoAnswer, NotInCluster, ObjectMissing

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import FakeKubernetes

MAPS = config_maps("default")


def new(name: str, **data: str) -> dict[str, object]:
    return {"metadata": {"name": name}, "data": data}


def test_an_object_is_created_read_and_replaced_by_its_version(cluster: FakeKubernetes) -> None:
    api = cluster.api()
    with pytest.raises(ObjectMissing):
        api.get(MAPS, "a")
    created = api.create(MAPS, new("a", key="1"))
    with pytest.raises(Conflict):
        api.create(MAPS, new("a"))
    api.replace(MAPS, {**created, "data": {"key": "2"}})
    with pytest.raises(Conflict, match=r"409 to PUT .*the object has been modified"):
        api.replace(MAPS, {**created, "data": {"key": "3"}})
    assert api.get(MAPS, "a")["data"] == {"key": "2"}
    assert api.list(MAPS, "a")[0] == [api.get(MAPS, "a")]
    assert api.list(MAPS, "b")[0] == []


def test_a_watch_yields_changes_of_one_object_and_ends_with_the_server(cluster: FakeKubernetes) -> None:
    api = cluster.api()
    _, version = api.list(MAPS, "a")
    cluster.put(new("a"))
    cluster.put(new("other"))
    cluster.put(new("a"))
    cluster.bookmark()
    cluster.delete("a")
    watched = api.watch(MAPS, "a", version)
    assert [next(watched).kind for _ in range(4)] == ["ADDED", "MODIFIED", "BOOKMARK", "DELETED"]
    cluster.end_watches()
    assert list(watched) == []


def test_a_watch_from_too_old_a_version_has_expired(cluster: FakeKubernetes) -> None:
    cluster.oldest = 1000
    with pytest.raises(Expired, match="too old"):
        list(cluster.api().watch(MAPS, "a", "1"))


@pytest.mark.parametrize("line", [b"no json\n", b"[]\n", b'{"type": "ADDED"}\n', b'{"type": "ADDED", "object": {}}\n'])
def test_a_line_that_is_no_event_is_refused(line: bytes) -> None:
    api = KubernetesApi("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(200, content=line)))
    with pytest.raises(ApiRefused, match="no event"):
        list(api.watch(MAPS, "a", "1"))


def test_refusals_name_the_remedy_and_silence_is_an_error_of_its_own(cluster: FakeKubernetes) -> None:
    cluster.fail = 403
    with pytest.raises(ApiRefused, match=r"403 to GET .*the server says no.*service account the right"):
        cluster.api().get(MAPS, "a")
    with pytest.raises(ApiRefused, match="403"):
        list(cluster.api().watch(MAPS, "a", "1"))
    cluster.fail = httpx.ConnectError("refused")
    with pytest.raises(NoAnswer, match=r"http://cluster gives no answer \(ConnectError\)"):
        cluster.api().get(MAPS, "a")


def test_an_answer_that_is_no_object_is_refused() -> None:
    api = KubernetesApi("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>")))
    with pytest.raises(ApiRefused, match="no object of Kubernetes"):
        api.get(MAPS, "a")


def test_the_token_is_read_again_for_each_call(cluster: FakeKubernetes, tmp_path: Path) -> None:
    token = tmp_path / "token"
    transport = httpx.MockTransport(cluster)
    api = KubernetesApi("http://cluster", auth=ServiceAccountToken(token), transport=transport)
    for text in ("first\n", "second\n"):
        token.write_text(text)
        api.list(MAPS, "a")
    assert cluster.tokens == ["Bearer first", "Bearer second"]


def test_outside_of_a_pod_an_address_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kubernetes, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NotInCluster, match="GRADSERVE_KUBERNETES_API"):
        connect()
    monkeypatch.setenv("GRADSERVE_KUBERNETES_API", "http://127.0.0.1:1")
    with pytest.raises(NoAnswer, match=r"http://127\.0\.0\.1:1 "):
        connect().get(MAPS, "a")


def test_manifests_are_sent_as_json(cluster: FakeKubernetes) -> None:
    cluster.api().create(MAPS, new("a", text="é"))
    assert json.dumps(cluster.objects["a"]["data"]) == '{"text": "\\u00e9"}'
