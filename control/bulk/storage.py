"""Folders on this machine or in a store: a path, or a URL that pyarrow (s3, gs, abfs, hdfs) or else fsspec reads."""

from __future__ import annotations

import posixpath
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTIAL_SUFFIX = ".partial"
"""The end of a file's name while it is written."""


class Storage(NamedTuple):
    """An open folder: `files` is pyarrow's file system, `root` the folder's path in it."""

    files: Any
    root: str

    def path(self, name: str) -> str:
        """Return the path of `name`, a path below the folder."""
        return posixpath.join(self.root, name)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            OSError: it cannot be read.
        """
        with self.files.open_input_stream(self.path(name)) as file:
            data: bytes = file.read()
        return data

    def write(self, name: str, data: bytes | Any) -> None:  # noqa: ANN401 - pyarrow.Buffer too
        """Write a file that appears with all its bytes, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        folder, _, base = name.rpartition("/")
        partial = self.path(posixpath.join(folder, f".{base}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"))
        with self.files.open_output_stream(partial) as file:
            file.write(data)
        self.files.move(partial, self.path(name))

    def names(self) -> Sequence[str]:
        """Return the paths of all files below the folder, sorted; none of a folder that does not exist.

        Raises:
            OSError: the folder cannot be read.
        """
        from pyarrow import fs  # noqa: PLC0415 - optional

        found = self.files.get_file_info(fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        return sorted(posixpath.relpath(info.path, self.root) for info in found if info.type == fs.FileType.File)

    def is_file(self) -> bool:
        """Return True if the path is one file."""
        from pyarrow import fs  # noqa: PLC0415 - optional

        is_file: bool = self.files.get_file_info(self.root).type == fs.FileType.File
        return is_file

    def parent(self) -> Storage:
        """Return the folder that this one is in."""
        return self._replace(root=posixpath.dirname(self.root))


def open_storage(place: str) -> Storage:
    """Return the open folder at `place`, a path or a URL.

    Raises:
        OSError, ValueError, ImportError: there is no such kind of store, or the package that reads it is missing.
    """
    from pyarrow import ArrowInvalid, fs  # noqa: PLC0415 - optional

    if "://" not in place:
        return Storage(fs.LocalFileSystem(), str(Path(place).resolve()))
    try:
        return Storage(*fs.FileSystem.from_uri(place))
    except ArrowInvalid:
        import fsspec  # noqa: PLC0415 - optional

        files, root = fsspec.core.url_to_fs(place)
        return Storage(fs.PyFileSystem(fs.FSSpecHandler(files)), root)


def public_name(place: str) -> str:
    """Return the place without what its URL may hold of keys: user, password and query; a path as an absolute one."""
    if "://" not in place:
        return str(Path(place).resolve())
    url = urlsplit(place)
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path.rstrip("/"), "", ""))
