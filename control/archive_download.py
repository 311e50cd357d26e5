"""Download an archive from the URL that the plan names: a file, HTTPS, or through fsspec (S3 and others).

Nothing is parsed here. The bytes are counted and hashed while they arrive, and kept only if they are the expected ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import httpx

from control.archive import signature_path
from control.errors import ArchiveError, MissingExtra
from gateway.settings import is_loopback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_BYTES = 1024 * 1024
MOST_SIGNATURE_BYTES = 64 * 1024
MOST_REDIRECTS = 5
SILENT_S = 15.0
WITHIN_S = 900.0
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


def is_url(what: str) -> bool:
    """Return True if `what` is the URL of an archive."""
    return _URL.fullmatch(what) is not None and urlsplit(what).path.endswith(".mar")


def download(
    source: str, target: Path, *, most_bytes: int, sha256: str | None = None, allows_http: bool = False
) -> Path:
    """Download the archive at `source` to the file `target`, and its signature beside it if it has one.

    Plain HTTP is for this machine only, unless `allows_http`. With `sha256` other bytes are refused.

    Raises:
        ArchiveError: it cannot be fetched, has more than `most_bytes` or other bytes.
        MissingExtra: the URL needs fsspec, which is not installed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        archive = Path(folder, "archive")
        found = _save(source, archive, target, most_bytes, allows_http=allows_http)
        if sha256 is not None and found != sha256:
            raise ArchiveError(
                target, f"{shown(source)} has the SHA-256 {found[:12]}…, the plan says {sha256[:12]}…: it was replaced"
            )
        download_signature(source, target, allows_http=allows_http)
        archive.replace(target)
    return target


def download_signature(source: str, target: Path, *, allows_http: bool = False) -> None:
    """Download the signature of the archive at `source`, the file beside it, to the file beside `target`.

    Without one nothing is written: with trusted keys the inspection says that it is missing.
    """
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        signature = Path(folder, "signature")
        with contextlib.suppress(ArchiveError):
            _save(_signature_url(source), signature, target, MOST_SIGNATURE_BYTES, allows_http=allows_http)
            signature.replace(signature_path(target))


def _save(source: str, path: Path, archive: Path, most_bytes: int, *, allows_http: bool) -> str:
    """Write the bytes at `source` to `path` and return their SHA-256; errors name `archive`."""
    digest, size, began = hashlib.sha256(), 0, time.monotonic()
    try:
        with _opened(source, archive, allows_http=allows_http) as chunks, path.open("wb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > most_bytes:
                    raise ArchiveError(archive, f"{shown(source)} has more than {most_bytes} bytes (AGENT_ARCHIVE_MB)")
                if time.monotonic() - began > WITHIN_S:
                    raise ArchiveError(archive, f"{shown(source)} took more than {WITHIN_S:.0f} s")
                digest.update(chunk)
                file.write(chunk)
    except httpx.HTTPError as error:
        raise ArchiveError(archive, f"{shown(source)} gives no answer ({type(error).__name__})") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArchiveError(archive, f"{shown(source)} cannot be fetched ({reason})") from error
    return digest.hexdigest()


@contextmanager
def _opened(source: str, archive: Path, *, allows_http: bool) -> Iterator[Iterable[bytes]]:
    parts = urlsplit(source)
    if parts.scheme == "file":
        with Path(unquote(parts.path)).open("rb") as file:
            yield iter(lambda: file.read(CHUNK_BYTES), b"")
    elif parts.scheme in {"http", "https"}:
        # No proxies and passwords from the environment, but its authorities: SSL_CERT_FILE.
        with (
            httpx.Client(timeout=SILENT_S, trust_env=False, verify=httpx.create_ssl_context()) as client,
            _response(client, source, archive, allows_http=allows_http) as response,
        ):
            yield response.iter_bytes(CHUNK_BYTES)
    else:
        try:
            import fsspec  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtra("fsspec", f"an archive at {parts.scheme}://", "sources") from error
        try:
            with fsspec.open(source, "rb") as file:
                yield iter(lambda: file.read(CHUNK_BYTES), b"")
        except (ValueError, ImportError) as error:  # no such scheme, or its package is missing
            raise ArchiveError(archive, f"{shown(source)} cannot be fetched ({error})") from error


@contextmanager
def _response(client: httpx.Client, source: str, archive: Path, *, allows_http: bool) -> Iterator[httpx.Response]:
    """Send the request and follow redirects, each checked like the first address."""
    url = httpx.URL(source)
    for _ in range(MOST_REDIRECTS + 1):
        if url.scheme != "https" and not (url.scheme == "http" and (allows_http or is_loopback(url.host))):
            raise ArchiveError(
                archive, f"{shown(str(url))} is not HTTPS: serve it by HTTPS, or set AGENT_SOURCE_HTTP=true"
            )
        # Without compression the limit of bytes holds for what is sent too.
        with client.stream("GET", url, headers={"accept-encoding": "identity"}) as response:
            if response.next_request is None:
                if not response.is_success:
                    raise ArchiveError(archive, f"{shown(source)} answers {response.status_code}")
                yield response
                return
            url = response.next_request.url
    raise ArchiveError(archive, f"{shown(source)} redirects more than {MOST_REDIRECTS} times")


def _signature_url(source: str) -> str:
    parts = urlsplit(source)
    return parts._replace(path=f"{parts.path}.sig").geturl()


def shown(source: str) -> str:
    """Return the URL without its query and password, which may be secret."""
    parts = urlsplit(source)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
