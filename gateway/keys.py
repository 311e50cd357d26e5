"""API keys: only their SHA-256 is stored, in a file that `gradserve keys` edits and the gateway re-reads.

{"schema": 1, "keys": [{"name": "alice", "sha256": "…", "scopes": ["predict", "explain"], "created": "2026-01-31"}]}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMA = 1
SCOPES = ("predict", "explain", "read")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class KeyFileError(ValueError):
    """Keys that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Key:
    """A caller: its name in logs, its key's SHA-256 in hexadecimal, what it may do, when it was made (ISO date)."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    created: str = ""


def make_key(name: str, scopes: Sequence[str], *, created: str = "") -> tuple[str, Key]:
    """A new secret of 256 random bits, to be shown once, and the key that is stored for it.

    Raises:
        KeyFileError: the name or a scope cannot be.
    """
    secret = "gs_" + secrets.token_urlsafe(32)
    return secret, check_key(Key(name, digest(secret), tuple(scopes), created))


def digest(secret: str) -> str:
    """The SHA-256 of a secret, in hexadecimal. It needs no salt: 256 random bits cannot be guessed."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def check_key(key: Key) -> Key:
    """The key itself, if it can be one.

    Raises:
        KeyFileError: its name, digest or scopes cannot be.
    """
    if not NAME.fullmatch(key.name):
        raise KeyFileError(f"key name {key.name!r} does not match {NAME.pattern}")
    if not SHA256.fullmatch(key.sha256):
        raise KeyFileError(f"key {key.name} has no SHA-256 of 64 lower-case hexadecimal digits")
    if not key.scopes or set(key.scopes) - set(SCOPES):
        raise KeyFileError(f"key {key.name} has the scopes {list(key.scopes)}: use one or more of {', '.join(SCOPES)}")
    return key


def load_keys(path: Path) -> tuple[Key, ...]:
    """The keys in the file `path`.

    Raises:
        KeyFileError: the file is no JSON or holds something that is no key.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KeyFileError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("keys"), list):
        raise KeyFileError(f"{path.name} is no key file of schema {SCHEMA}")
    return check_names(_parse_key(item) for item in data["keys"])


def save_keys(path: Path, keys: Sequence[Key]) -> None:
    """Replaces the file `path` in one step, by one with its mode; only its owner may read a new one.

    Raises:
        KeyFileError: two keys share a name.
    """
    data = {"schema": SCHEMA, "keys": [asdict(key) for key in check_names(keys)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp makes the file readable by its owner only, before anything is in it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        if path.exists():  # a gateway that runs as somebody else has to go on reading it
            os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def parse_entry(entry: str) -> Key:
    """The key that `name:sha256:scope+scope` (GATEWAY_KEYS) describes.

    Raises:
        KeyFileError: it describes none.
    """
    parts = entry.split(":")
    if len(parts) != 3:
        # Not the entry itself: it may be a secret in the wrong place.
        raise KeyFileError("an entry is no key: write name:sha256:scope+scope")
    name, sha256, scopes = parts
    return check_key(Key(name, sha256, tuple(scopes.split("+"))))


def check_names(keys: Iterable[Key]) -> tuple[Key, ...]:
    """The keys, if their names differ.

    Raises:
        KeyFileError: two keys share a name.
    """
    checked: dict[str, Key] = {}
    for key in keys:
        if key.name in checked:
            raise KeyFileError(f"there are two keys named {key.name}")
        checked[key.name] = key
    return tuple(checked.values())


def _parse_key(item: object) -> Key:
    if not isinstance(item, dict):
        raise KeyFileError(f"a key is an object, not {type(item).__name__}")
    scopes = item.get("scopes")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise KeyFileError(f"key {item.get('name')!r} has no list of scopes")
    name, sha256, created = (str(item.get(field, "")) for field in ("name", "sha256", "created"))
    return check_key(Key(name, sha256, tuple(scopes), created))
