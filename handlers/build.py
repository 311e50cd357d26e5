"""An archive's identity: the hash of everything in it, our own code included. Needs the standard library only."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

BUILD = "build.json"


class BrokenArchive(RuntimeError):
    """An archive that must not be served; the message says which file and why."""


def write_build(directory: Path) -> str:
    """Writes `build.json` over every other file in `directory` and returns the identity."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path != directory / BUILD)
    files = {path.relative_to(directory).as_posix(): digest(path) for path in paths}
    build = identity(files)
    text = json.dumps({"identity": build, "files": dict(sorted(files.items()))}, indent=2)
    (directory / BUILD).write_text(text + "\n", encoding="utf-8")
    return build


def verify_files(directory: Path) -> str:
    """The archive's identity, once every file has the hash that `build.json` gives.

    Raises:
        BrokenArchive: a file is missing or was changed, or `build.json` contradicts itself.
    """
    build = read_json(directory / BUILD)
    files = build.get("files")
    if not isinstance(files, dict) or build.get("identity") != identity(files):
        raise BrokenArchive(f"{BUILD} does not fit its own identity: pack the model again")
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise BrokenArchive(f"{name} is missing from the archive: pack the model again")
        if digest(path) != expected:
            raise BrokenArchive(f"{name} is not what was packed: pack the model again")
    return str(build["identity"])


def identity(files: dict[str, str]) -> str:
    """The identity of a set of files, from their names and SHA-256 digests."""
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the archive.

    Raises:
        BrokenArchive: there is no such file, or no JSON object in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenArchive(f"{path.name} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise BrokenArchive(f"{path.name} holds no JSON object")
    return data
