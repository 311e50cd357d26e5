import json
import threading
import zipfile
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from control.images.archive_source import ArchiveSource
from control.stack.stack import pack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def serve():
    """`serve(answer)`: the address of a server; `answer(headers)` returns status and body of each response."""
    servers = []

    def serve(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = answer(self.headers)
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                self.do_GET()

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


CONTRACT = {
    "schema": 1,
    "name": "m",
    "version": "1.0",
    "classes": ["cat", "dog"],
    "input": {"height": 1, "width": 1, "mean": [0, 0, 0], "std": [1, 1, 1]},
    "architecture": "resnet18_small",
}


@pytest.fixture(scope="session")
def write_archive():
    """`write_archive(path, **contract)`: the smallest archive that passes the checks, with these fields of a contract.

    `comment` makes it one of other bytes.
    """

    def write(path, *, comment=b"", **contract):
        contract = CONTRACT | contract
        count = len(contract["classes"])
        reference = {"tolerance": 0.01, "images": ["YQ=="], "probabilities": [[1 / count] * count]}
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as members:
            members.writestr("contract.json", json.dumps(contract))
            members.writestr("reference.json", json.dumps(reference))
            members.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelVersion": contract["version"]}}))
            members.comment = comment
        return path

    return write


@pytest.fixture
def archive(tmp_path, write_archive):
    """The smallest archive."""
    return write_archive(tmp_path / "m-1.0.mar")


@pytest.fixture
def keys(tmp_path):
    """`keys(name)`: the files of a new private key and of its public one."""

    def keys(name, key=None, password=None):
        key = key or ec.generate_private_key(ec.SECP256R1())
        locked = BestAvailableEncryption(password) if password else NoEncryption()
        private, public = tmp_path / f"{name}.key", tmp_path / f"{name}.pub"
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return private, public

    return keys


OVERLAY = b"\x89PNG overlay"


class FakeGateway:
    """Answers images as the gateway does: `image-of-dog` is a dog, and `bad:` images and wrong keys are refused."""

    def __init__(self, key=None):
        self.key = key
        self.calls = []

    def answer(self, path, query, headers, body):
        self.calls.append((path, query))
        if self.key and headers["authorization"] != f"Bearer {self.key}":
            return 401, {"code": "key_missing", "status": 401, "detail": "send a key"}
        model = {"model": {"name": "cifar10", "version": query.get("version", "1.0.0")}, "request_id": "r1"}
        if path == "/predict/batch":
            images = [part.split(b"\r\n--")[0] for part in body.split(b"\r\n\r\n")[1:]]
            if len(images) > 1 and b"bad:whole" in images:
                return 413, {"code": "body_too_large", "status": 413, "detail": "too large"}
            return 200, {"results": [self.entry(image) for image in images], **model}
        if query.get("target") == "unicorn":
            return 400, {"code": "unknown_target", "status": 400, "detail": "there is no class unicorn"}
        entry = self.entry(body)
        if "error" in entry:
            return entry["error"]["status"], entry["error"]
        if "json" not in headers["accept"]:
            return 200, OVERLAY
        entry |= {"target": {"class": query.get("target", entry["class"]), "confidence": 0.1}, "method": "cam"}
        entry |= {"strength": 1.0, "familiarity": 0.01, "similar": []}
        if "coverage" in query:
            entry["classes"] = entry["top"]
        if query.get("test") == "true":
            entry["test"] = {"kept": 0.5, "removed": 0.1, "verdict": "The hot region decides."}
        return 200, entry | model

    def entry(self, image):
        if image.startswith(b"bad:"):
            return {"error": {"status": 422, "code": "image_unreadable", "detail": "no image"}}
        name = image.decode().removeprefix("image-of-")
        top = [{"class": name, "confidence": 0.9}, {"class": "frog", "confidence": 0.1}]
        return {**top[0], "top": top, "familiar": name != "boat"}


@pytest.fixture
def start_gateway():
    """`start_gateway(key=…)`: a fake gateway and its address."""
    servers = []

    def start(**options):
        gateway = FakeGateway(**options)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers["content-length"]))
                status, answer = gateway.answer(url.path, dict(parse_qsl(url.query)), self.headers, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        servers.append(server)
        return gateway, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def released_archive(tmp_path_factory):
    """The released model, packed as `gradserve up` packs it."""
    return pack(ROOT / "model_store" / "released", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def released_source(released_archive):
    """The released archive, loaded into this process; loading it takes seconds."""
    with closing(ArchiveSource(released_archive)) as source:
        yield source
