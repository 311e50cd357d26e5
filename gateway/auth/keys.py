"""API keys: a file, edited by `gradserve keys` and re-read by the gateway, holds only their SHA-256.

{"schema": 3, "keys": [{"name": "alice", "sha256": "…", "scopes": ["predict", "explain"], "created": "2026-01-31",
                        "expires": "2026-12-31T00:00:00+00:00", "quota": "600/minute", "models": ["photos"]}]}

`created`, `expires`, `quota` and `models` are optional. Files of schema 1, which have no expiry and no quota, and of
schema 2, which have no models, can be read too. A file without models is written in schema 2, so that older gateways
still follow it; they would ignore models, so they must not read a file with some.
While a key is rotated there are two with its name; of the keys with one name all except one must have an expiry.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.names import NAME as MODEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMA_WITHOUT_MODELS, SCHEMA = 2, 3
READABLE = (1, 2, 3)
SCOPES = ("predict", "explain", "read", "feedback")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
QUOTA = re.compile(r"[1-9][0-9]{0,8}/(?:second|minute|hour|day)")


class KeyFileError(ValueError):
    """Raised for keys that cannot be used; the message says which one and why."""


@dataclass(frozen=True)
class Key:
    """A caller's key.

    Attributes:
        name: the caller's name in logs and metrics.
        sha256: the secret's SHA-256 in hexadecimal.
        scopes: what the caller may do, of `SCOPES`.
        created: the day on which the key was made (ISO date).
        expires: the moment from which on the key is refused (ISO date and time with offset); empty: never.
        quota: the calls that the caller may make, like `600/minute`; empty: GATEWAY_RATE_PER_KEY.
        models: the models that the caller may call; empty: all.
    """

    name: str
    sha256: str
    scopes: tuple[str, ...]
    created: str = ""
    expires: str = ""
    quota: str = ""
    models: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The first eight digits of the SHA-256, by which metrics, logs and lists distinguish two keys of one name."""
        return self.sha256[:8]

    def is_expired(self, now: datetime | None = None) -> bool:
        """Return True if the key is expired at `now`, by default the present moment."""
        return bool(self.expires) and datetime.fromisoformat(self.expires) <= (now or datetime.now(UTC))


def make_key(
    name: str,
    scopes: Sequence[str],
    *,
    created: str = "",
    expires: str = "",
    quota: str = "",
    models: Sequence[str] = (),
) -> tuple[str, Key]:
    """Return a new secret of 256 random bits, to be shown once, and the key that is stored for it.

    Raises:
        KeyFileError: the name, a scope, the expiry, the quota or a model is impossible.
    """
    secret = "gs_" + secrets.token_urlsafe(32)
    return secret, check_key(Key(name, digest(secret), tuple(scopes), created, expires, quota, tuple(models)))


def digest(secret: str) -> str:
    """Return a secret's SHA-256 in hexadecimal. It needs no salt, because 256 random bits cannot be guessed."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def check_key(key: Key) -> Key:
    """Return the key itself.

    Raises:
        KeyFileError: its name, digest, scopes, expiry, quota or models are impossible.
    """
    if not NAME.fullmatch(key.name):
        raise KeyFileError(f"key name {key.name!r} does not match {NAME.pattern}")
    if not SHA256.fullmatch(key.sha256):
        raise KeyFileError(f"key {key.name} has no SHA-256 of 64 lower-case hexadecimal digits")
    if not key.scopes or set(key.scopes) - set(SCOPES):
        raise KeyFileError(f"key {key.name} has the scopes {list(key.scopes)}: use one or more of {', '.join(SCOPES)}")
    if key.expires and not _is_moment(key.expires):
        raise KeyFileError(f"key {key.name} expires at {key.expires!r}: write like 2026-12-31T00:00:00+00:00")
    if key.quota and not QUOTA.fullmatch(key.quota):
        raise KeyFileError(f"key {key.name} has the quota {key.quota!r}: write like 600/minute (second, hour, day)")
    if wrong := [model for model in key.models if not MODEL.fullmatch(model)]:
        raise KeyFileError(f"key {key.name} has the model {wrong[0]!r}: write a model's name, like cifar10")
    return key


def load_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys in the file `path`.

    Raises:
        KeyFileError: the file is no JSON, or has an entry that is no key.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise KeyFileError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") not in READABLE or not isinstance(data.get("keys"), list):
        raise KeyFileError(f"{path.name} is no key file of schema {' or '.join(map(str, READABLE))}")
    return check_names(_parse_key(item) for item in data["keys"])


def save_keys(path: Path, keys: Sequence[Key]) -> None:
    """Replace the file `path` atomically and keep its mode; only its owner may read a new file.

    Raises:
        KeyFileError: two keys have the same name and no expiry.
    """
    items = [{field: value for field, value in asdict(key).items() if value} for key in check_names(keys)]
    schema = SCHEMA if any(key.models for key in keys) else SCHEMA_WITHOUT_MODELS
    data = {"schema": schema, "keys": items}
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp creates the file with mode 0600.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        if path.exists():  # a gateway that runs as another user must still be able to read it
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
    """Return the key of an entry `name:sha256:scope+scope` of GATEWAY_KEYS, or with models: `…:model+model`.

    Raises:
        KeyFileError: the entry is no key.
    """
    parts = entry.split(":")
    if len(parts) not in {3, 4}:
        # The message does not quote the entry: it may be a secret in the wrong place.
        raise KeyFileError("an entry is no key: write name:sha256:scope+scope, or name:sha256:scope+scope:model+model")
    name, sha256, scopes, *models = parts
    return check_key(Key(name, sha256, tuple(scopes.split("+")), models=tuple(models[0].split("+")) if models else ()))


def check_names(keys: Iterable[Key]) -> tuple[Key, ...]:
    """Return the keys, whose names are unique except for keys with an expiry.

    Raises:
        KeyFileError: two keys have the same name and no expiry, or the same digest.
    """
    checked = tuple(keys)
    lasting: set[str] = set()
    digests: set[str] = set()
    for key in checked:
        if key.sha256 in digests or (not key.expires and key.name in lasting):
            raise KeyFileError(f"there are two keys named {key.name}")
        digests.add(key.sha256)
        if not key.expires:
            lasting.add(key.name)
    return checked


def _parse_key(item: object) -> Key:
    if not isinstance(item, dict):
        raise KeyFileError(f"a key is an object, not {type(item).__name__}")
    scopes, models = _texts(item, "scopes"), _texts({"models": [], **item}, "models")
    if "models" in item and not models:
        raise KeyFileError(f"key {item.get('name')!r} has an empty list of models: leave it out to allow all")
    fields = ("name", "sha256", "created", "expires", "quota")
    name, sha256, created, expires, quota = (str(item.get(field, "")) for field in fields)
    return check_key(Key(name, sha256, scopes, created, expires, quota, models))


def _texts(item: dict[str, object], field: str) -> tuple[str, ...]:
    found = item.get(field)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise KeyFileError(f"key {item.get('name')!r} has no list of {field}")
    return tuple(found)


def _is_moment(text: str) -> bool:
    """Return True if `text` is an ISO date and time with an offset."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
