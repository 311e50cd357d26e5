"""The client of the Kubernetes API."""

from __future__ import annotations

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import httpx
import pytest

from gateway.kubernetes import addresses
from gateway.kubernetes.api import KubernetesApi, ServiceAccountToken, config_maps, connect, named
from gateway.kubernetes.errors import ApiRefused, Conflict, Expired, NoAnswer, NotInCluster, ObjectMissing

if TYPE_CHECKING:
    from collections.abc import Callable
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
    assert api.list(MAPS, named("a"))[0] == [api.get(MAPS, "a")]
    assert api.list(MAPS, named("b"))[0] == []


def test_a_watch_yields_changes_of_one_object_and_ends_with_the_server(cluster: FakeKubernetes) -> None:
    api = cluster.api()
    _, version = api.list(MAPS, named("a"))
    cluster.put(new("a"))
    cluster.put(new("other"))
    cluster.put(new("a"))
    cluster.bookmark()
    cluster.delete("a")
    watched = api.watch(MAPS, named("a"), version)
    assert [next(watched).kind for _ in range(4)] == ["ADDED", "MODIFIED", "BOOKMARK", "DELETED"]
    cluster.end_watches()
    assert list(watched) == []


def test_a_watch_from_too_old_a_version_has_expired(cluster: FakeKubernetes) -> None:
    cluster.oldest = 1000
    with pytest.raises(Expired, match="too old"):
        list(cluster.api().watch(MAPS, named("a"), "1"))


@pytest.mark.parametrize("line", [b"no json\n", b"[]\n", b'{"type": "ADDED"}\n', b'{"type": "ADDED", "object": {}}\n'])
def test_a_line_that_is_no_event_is_refused(line: bytes) -> None:
    api = KubernetesApi("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(200, content=line)))
    with pytest.raises(ApiRefused, match="no event"):
        list(api.watch(MAPS, named("a"), "1"))


def test_refusals_name_the_remedy_and_silence_is_an_error_of_its_own(cluster: FakeKubernetes) -> None:
    cluster.fail = 403
    with pytest.raises(ApiRefused, match=r"403 to GET .*the server says no.*service account the right"):
        cluster.api().get(MAPS, "a")
    with pytest.raises(ApiRefused, match="403"):
        list(cluster.api().watch(MAPS, named("a"), "1"))
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
        api.list(MAPS, named("a"))
    assert cluster.tokens == ["Bearer first", "Bearer second"]


def test_outside_of_a_pod_an_address_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(addresses, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NotInCluster, match="GRADSERVE_KUBERNETES_API"):
        connect()
    monkeypatch.setenv("GRADSERVE_KUBERNETES_API", "http://127.0.0.1:1")
    api = connect()
    with pytest.raises(NoAnswer, match=r"http://127\.0\.0\.1:1 "):
        api.get(MAPS, "a")
    api.close()


def test_manifests_are_sent_as_json(cluster: FakeKubernetes) -> None:
    cluster.api().create(MAPS, new("a", text="é"))
    assert json.dumps(cluster.objects["a"]["data"]) == '{"text": "\\u00e9"}'


def test_in_a_pod_the_service_accounts_authority_token_and_address_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, self_signed: Callable[[str], tuple[bytes, bytes]]
) -> None:
    key, authority = self_signed("127.0.0.1")
    (tmp_path / "ca.crt").write_bytes(authority)
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "token").write_text("secret\n")
    tokens = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"metadata": {}}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(addresses, "SERVICE_ACCOUNT", tmp_path)
        monkeypatch.delenv("GRADSERVE_KUBERNETES_API", raising=False)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_port))
        api = connect()
        assert api.get(MAPS, "a") == {"metadata": {}}
        api.close()
        (tmp_path / "ca.crt").write_bytes(self_signed("127.0.0.1")[1])
        stranger = connect()
        with pytest.raises(NoAnswer):
            stranger.get(MAPS, "a")
        stranger.close()
        server.shutdown()
    assert tokens == ["Bearer secret"]
