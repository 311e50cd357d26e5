import hashlib
import ssl
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from control import archive_download
from control.archive_download import download, is_url
from control.errors import ArchiveError

DATA = b"archive" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


@contextmanager
def serving(certificate=None):
    """The URL of a server with /m-1.0.mar, its signature, and redirects; HTTPS with a file of certificate and key."""
    redirects = {
        "/moved/m-1.0.mar": "/m-1.0.mar",
        "/far/m-1.0.mar": "http://192.0.2.1/m-1.0.mar",
        "/loop.mar": "/loop.mar",
    }
    files = {"/m-1.0.mar": DATA, "/m-1.0.mar.sig": b"signed"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            self.send_response(302 if path in redirects else 200 if path in files else 404)
            self.send_header("location", redirects.get(path, ""))
            self.end_headers()
            self.wfile.write(files.get(path, b""))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def server():
    with serving() as url:
        yield url


@pytest.mark.parametrize("path", ["/m-1.0.mar", "/moved/m-1.0.mar", "/m-1.0.mar?token=secret"])
def test_an_archive_comes_with_its_signature(server, tmp_path, path):
    target = download(f"{server}{path}", tmp_path / "new" / "m-1.0.mar", most_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA
    assert (tmp_path / "new" / "m-1.0.mar.sig").exists() == (not path.startswith("/moved"))
    assert not list(target.parent.glob(".*"))


def test_other_bytes_and_too_many_leave_no_file(server, tmp_path):
    target = tmp_path / "m-1.0.mar"
    with pytest.raises(ArchiveError, match=r"has the SHA-256 .* the plan says 0000.*replaced"):
        download(f"{server}/m-1.0.mar", target, most_bytes=10**6, sha256="0" * 64)
    with pytest.raises(ArchiveError, match=r"more than 6999 bytes \(AGENT_ARCHIVE_MB\)"):
        download(f"{server}/m-1.0.mar", target, most_bytes=len(DATA) - 1, sha256=SHA256)
    assert not list(tmp_path.iterdir())


def test_a_missing_archive_is_named_without_its_query(server, tmp_path):
    with pytest.raises(ArchiveError, match=r"/gone\.mar answers 404$"):
        download(f"{server}/gone.mar?token=secret", tmp_path / "m.mar", most_bytes=10)
    with pytest.raises(ArchiveError, match="redirects more than 5 times"):
        download(f"{server}/loop.mar", tmp_path / "m.mar", most_bytes=10)


@pytest.mark.parametrize("path", ["/far/m-1.0.mar", None])
def test_plain_http_to_other_machines_is_refused_also_after_a_redirect(server, tmp_path, path):
    source = f"{server}{path}" if path else "http://192.0.2.1/m-1.0.mar"
    with pytest.raises(ArchiveError, match=r"http://192\.0\.2\.1/m-1\.0\.mar is not HTTPS.*AGENT_SOURCE_HTTP"):
        download(source, tmp_path / "m.mar", most_bytes=10)


def test_plain_http_is_allowed_by_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_download, "SILENT_S", 0.05)
    with pytest.raises(ArchiveError, match=r"gives no answer \(Connect"):
        download("http://192.0.2.1/m.mar", tmp_path / "m.mar", most_bytes=10, allows_http=True)


def test_an_authority_of_ones_own_is_trusted_if_it_is_named(tmp_path, monkeypatch, self_signed):
    (tmp_path / "server.pem").write_bytes(b"".join(self_signed("127.0.0.1")))
    with serving(tmp_path / "server.pem") as url:
        with pytest.raises(ArchiveError, match=r"gives no answer \(ConnectError\)"):
            download(f"{url}/m-1.0.mar", tmp_path / "m-1.0.mar", most_bytes=len(DATA))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
        target = download(f"{url}/m-1.0.mar", tmp_path / "m-1.0.mar", most_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA


def test_a_file_and_other_schemes_are_read(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    source = tmp_path / "with space.mar"
    source.write_bytes(DATA)
    target = tmp_path / "store" / "m.mar"
    url = source.as_uri()
    assert download(url, target, most_bytes=10**6, sha256=SHA256).read_bytes() == DATA
    with fsspec.open("memory://models/m.mar", "wb") as file:
        file.write(DATA)
    assert download("memory://models/m.mar", target, most_bytes=10**6, sha256=SHA256) == target
    with pytest.raises(ArchiveError, match="cannot be fetched"):
        download("nothing://models/m.mar", target, most_bytes=10)
    with pytest.raises(ArchiveError, match="No such file"):
        download("file:///nowhere/m.mar", target, most_bytes=10)


def test_only_addresses_of_archives_count_as_urls():
    assert is_url("https://models.example/m-1.0.mar?token=x")
    assert not is_url("m-1.0.mar")
    assert not is_url("https://models.example/page.html")
