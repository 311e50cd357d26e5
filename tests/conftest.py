"""The distribution of tests over processes, and fixtures for the tests of several packages.

An API server of Kubernetes as a function from request to response; certificates; images scored in bulk without Ray.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import cloudpickle
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from xdist.scheduler import LoadFileScheduling

from control import bulk
from control.bulk.scorer import ArchiveModel, Scorer
from gateway.kubernetes.api import KubernetesApi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xdist.remote import Producer

SHARING = ("tests/integration/", "tests/training/")
"""Folders whose tests share what is slow to make: a stack; trained networks and MLflow's tables."""


class SharingScheduling(LoadFileScheduling):
    """Whole files for each test process, and all files of a folder whose tests share something for one of them."""

    def _split_scope(self, nodeid: str) -> str:
        folder = next((folder for folder in SHARING if nodeid.startswith(folder)), None)
        return folder or str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SharingScheduling:
    """Return the scheduler for several test processes."""
    return SharingScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the folders for one process first, if there are several: small files then even out the processes' ends."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(SHARING))


@dataclass
class FakeKubernetes:
    """ConfigMaps and EndpointSlices with `resourceVersion`, 404, 409 and watches.

    Watches from before `oldest` get 410. `fail` is the status, or the exception, of every call.
    """

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = 100
    oldest: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    fail: int | Exception | None = None
    events: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    watches_ended: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        parts = request.url.path.partition("/v1/namespaces/")[2].split("/")
        assert parts[:2] in (["default", "configmaps"], ["default", "endpointslices"]), request.url
        is_watch = request.url.params.get("watch") == "true"
        with self.changed:
            self.calls.append(("WATCH" if is_watch else request.method, parts[2] if parts[2:] else ""))
            self.tokens.append(request.headers.get("authorization"))
            if isinstance(self.fail, Exception):
                raise self.fail
            if self.fail is not None:
                return self.status(self.fail, "the server says no")
        if request.method == "GET" and len(parts) == 2:
            if is_watch:
                return self.watch(request.url.params, int(request.url.params["resourceVersion"]))
            items = [found for found in self.objects.values() if is_selected(request.url.params, found)]
            return httpx.Response(200, json={"metadata": {"resourceVersion": str(self.version)}, "items": items})
        if request.method == "GET":
            found = self.objects.get(parts[2])
            return httpx.Response(200, json=found) if found else self.status(404, "not found")
        manifest = json.loads(request.content)
        name = manifest["metadata"]["name"]
        if request.method == "POST":
            return self.status(409, "exists") if name in self.objects else self.put(manifest)
        if name not in self.objects:
            return self.status(404, "not found")
        stale = manifest["metadata"]["resourceVersion"] != self.objects[name]["metadata"]["resourceVersion"]
        return self.status(409, "the object has been modified") if stale else self.put(manifest)

    def put(self, manifest: dict[str, Any]) -> httpx.Response:
        """Keep the object under a new resourceVersion."""
        with self.changed:
            name = manifest["metadata"]["name"]
            kind = "MODIFIED" if name in self.objects else "ADDED"
            self.version += 1
            metadata = {**manifest["metadata"], "resourceVersion": str(self.version)}
            self.objects[name] = {**manifest, "metadata": metadata}
            self.events.append((self.version, kind, self.objects[name]))
            self.changed.notify_all()
            return httpx.Response(200, json=self.objects[name])

    def put_text(self, name: str, text: str) -> None:
        """Keep `text` as the plan in the ConfigMap `name`."""
        self.put({"metadata": {"name": name}, "data": {"plan.json": text}})

    def delete(self, name: str) -> None:
        """Remove the object."""
        with self.changed:
            self.version += 1
            gone = self.objects.pop(name)
            metadata = {**gone["metadata"], "resourceVersion": str(self.version)}
            self.events.append((self.version, "DELETED", {**gone, "metadata": metadata}))
            self.changed.notify_all()

    def bookmark(self) -> None:
        """Send a bookmark to every watch."""
        with self.changed:
            self.version += 1
            self.events.append((self.version, "BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}}))
            self.changed.notify_all()

    def end_watches(self) -> None:
        """End every watch, as the server does after some time."""
        with self.changed:
            self.watches_ended += 1
            self.changed.notify_all()

    def watch(self, params: httpx.QueryParams, since: int) -> httpx.Response:
        if since < self.oldest:
            event = {"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}
            return httpx.Response(200, content=json.dumps(event).encode() + b"\n")
        return httpx.Response(200, content=self.lines(params, since, self.watches_ended))

    def lines(self, params: httpx.QueryParams, since: int, ended: int) -> Iterator[bytes]:
        ends_at = time.monotonic() + float(params["timeoutSeconds"])
        while True:
            with self.changed:
                while self.watches_ended == ended and self.version <= since and time.monotonic() < ends_at:
                    self.changed.wait(ends_at - time.monotonic())
                due = [event for event in self.events if event[0] > since]
                since = self.version
                is_over = self.watches_ended > ended or time.monotonic() >= ends_at
            for _, kind, manifest in due:
                if kind == "BOOKMARK" or is_selected(params, manifest):
                    yield json.dumps({"type": kind, "object": manifest}).encode() + b"\n"
            if is_over:
                return

    @staticmethod
    def status(code: int, message: str) -> httpx.Response:
        return httpx.Response(code, json={"kind": "Status", "code": code, "message": message})

    def api(self) -> KubernetesApi:
        return KubernetesApi("http://cluster", transport=httpx.MockTransport(self))


def is_selected(params: httpx.QueryParams, manifest: dict[str, Any]) -> bool:
    """Return True if the object has the name, or the label, that a list or watch selects."""
    metadata = manifest["metadata"]
    if "labelSelector" in params:
        label, _, value = params["labelSelector"].partition("=")
        return bool(metadata.get("labels", {}).get(label) == value)
    return bool(params["fieldSelector"] == f"metadata.name={metadata['name']}")


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    """Return an API server without objects."""
    fake = FakeKubernetes()
    yield fake
    fake.end_watches()


@contextmanager
def serve(cluster: FakeKubernetes, host: str, listen: Callable[..., ThreadingHTTPServer]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            url = f"http://cluster{self.path}"
            response = cluster(httpx.Request(self.command, url, headers=dict(self.headers), content=body))
            self.send_response(response.status_code)
            self.end_headers()
            with suppress(OSError):  # a watch's client ends
                for chunk in response.stream:
                    self.wfile.write(chunk)
                    self.wfile.flush()

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with listen((host, 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{host}:{server.server_port}"
        cluster.end_watches()
        server.shutdown()


@pytest.fixture
def serve_cluster(cluster: FakeKubernetes) -> Callable[..., AbstractContextManager[str]]:
    """Return `serve_cluster(host, listen)`: a context manager with the address at which processes reach the API server.

    `listen` makes the server of its address and handler.
    """
    return lambda host, listen: serve(cluster, host, listen)


@pytest.fixture
def cluster_url(cluster: FakeKubernetes) -> Iterator[str]:
    """Return the address at which processes of this machine reach the API server."""
    with serve(cluster, "127.0.0.1", ThreadingHTTPServer) as url:
        yield url


def make_self_signed(host: str) -> tuple[bytes, bytes]:
    """Return a private key and a certificate of its own for the address."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="session")
def self_signed() -> Callable[[str], tuple[bytes, bytes]]:
    """`self_signed(host)`: a private key and a certificate that is its own authority, both PEM, for an IP address."""
    return make_self_signed


SCORE = """
import json, sys
import cloudpickle
for package in ("control", "gradserve", "gateway"):
    sys.modules[package] = None  # a cluster's machines need none of them
with open(sys.argv[1], "rb") as file:
    load_model, make_scorer, archive, jobs = cloudpickle.load(file)
model = load_model(archive)
counts = [[make_scorer(model, job)(shard) for shard in shards] for job, shards in jobs]
print(json.dumps({"counts": counts, "code": sys.modules["handlers.model"].__file__}))
"""


@pytest.fixture(scope="session")
def score_without_ray(tmp_path_factory):
    """`score_without_ray(archive, *plans)`: answer all shards in a process as one of a cluster.

    Returns the counts of each plan's shards, and the file that the handler's code came from.
    """

    def score(archive, *plans):
        jobs = [(plan.job, plan.shards) for plan in plans]
        file = tmp_path_factory.mktemp("bulk") / "job.pickle"
        cloudpickle.register_pickle_by_value(bulk)
        try:
            file.write_bytes(cloudpickle.dumps((ArchiveModel, Scorer, archive.read_bytes(), jobs)))
        finally:
            cloudpickle.unregister_pickle_by_value(bulk)
        done = subprocess.run([sys.executable, "-c", SCORE, file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return score
