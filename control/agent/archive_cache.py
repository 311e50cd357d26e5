"""The agent's cache of archives that the model store lacks and the plan names a source for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from control.archive import copy_name, file_sha256, signature_path
from control.archive_download import download, download_signature
from control.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path

    from control.settings import AgentSettings

_MB = 1_000_000


class ArchiveCache:
    """Archives in a folder, by their SHA-256; the ones that were used longest ago are removed above `cache_mb`."""

    def __init__(self, settings: AgentSettings) -> None:
        self._folder = settings.cache
        self._most_bytes = settings.cache_mb * _MB
        self._most_archive_bytes = min(settings.archive_mb, settings.cache_mb) * _MB
        self._allows_http = settings.source_http

    def fetch(self, source: str, sha256: str) -> Path:
        """Return the archive with this SHA-256, from the cache or else from `source`, with its signature beside it.

        Raises:
            ArchiveError: it cannot be fetched, is too large, or has other bytes.
            MissingExtra: the source needs fsspec, which is not installed.
        """
        path = self._folder / copy_name(sha256)
        try:
            if path.is_file() and file_sha256(path) == sha256:
                path.touch()
                if not signature_path(path).is_file():
                    # It may have been signed since.
                    download_signature(source, path, allows_http=self._allows_http)
                return path
            path.unlink(missing_ok=True)
            signature_path(path).unlink(missing_ok=True)
            download(source, path, most_bytes=self._most_archive_bytes, sha256=sha256, allows_http=self._allows_http)
            self._remove_oldest(path)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ArchiveError(path, f"the cache {self._folder} cannot be used ({reason}): set AGENT_CACHE") from error
        return path

    def _remove_oldest(self, kept: Path) -> None:
        """Remove archives until the folder has at most `cache_mb`; `kept` stays."""
        paths = sorted(self._folder.glob("*.mar"), key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in paths)
        for path in paths:
            if size <= self._most_bytes:
                return
            if path != kept:
                size -= path.stat().st_size
                path.unlink()
                signature_path(path).unlink(missing_ok=True)
