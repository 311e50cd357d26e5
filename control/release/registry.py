"""What the operator's commands fetch from MLflow's registry, and what they tell it; routing never waits for either."""
# ruff: noqa: PLC0415 (MLflow takes seconds to import, and is not installed on every operator's machine)

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.plan import NAME, VERSION
from control.errors import RegistryUnusable

if TYPE_CHECKING:
    from training.tracking.releases import Release

_REFERENCE = re.compile(rf"(?P<name>{NAME.pattern})(?:@(?P<alias>{NAME.pattern})|/(?P<number>[0-9]+))")
_PROMOTED = "promoted_"


@dataclass(frozen=True)
class Reference:
    """A registered version as MLflow names it: `NAME@alias` or `NAME/NUMBER`."""

    name: str
    alias: str | None
    number: str | None


def parse_reference(what: str) -> Reference | None:
    """The reference that `what` is; None where it is a version or a file."""
    found = None if what.endswith(".mar") else _REFERENCE.fullmatch(what)
    return Reference(found["name"], found["alias"], found["number"]) if found else None


def is_used() -> bool:
    """Whether there is a registry to tell: a tracking address is set, or the default file is there."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or Path("mlflow.db").is_file()


def find(reference: Reference) -> Release:
    """The registered release.

    Raises:
        RegistryUnusable: MLflow is not there, or has no such release.
    """
    try:
        from training.errors import RegistryError
        from training.tracking.releases import find_release
    except ImportError as error:
        raise RegistryUnusable("MLflow is not installed here: pip install 'gradserve[training]'") from error
    try:
        release = find_release(reference.name, alias=reference.alias, number=reference.number)
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error
    if not VERSION.fullmatch(release.version):
        raise RegistryUnusable(f"models:/{release.name}/{release.number} names the release {release.version!r}")
    return release


def fetch(release: Release, folder: Path) -> Path:
    """The release's archive, downloaded into `folder`.

    Raises:
        RegistryUnusable: it cannot be had.
    """
    from training.errors import RegistryError
    from training.tracking.releases import fetch_archive

    try:
        return fetch_archive(release, folder)
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error


def tell_champion(model: str, sha256: str, *, home: Path, who: str) -> str:
    """Moves the aliases to the release with this archive, and says so; takes seconds at most.

    Raises:
        RegistryUnusable: it could not be done.
    """
    try:
        from training.errors import RegistryError
        from training.tracking.releases import CHAMPION, set_champion
    except ImportError as error:
        raise RegistryUnusable("MLflow is not installed here") from error
    facts = {
        f"{_PROMOTED}at": datetime.now(UTC).isoformat(timespec="seconds"),
        f"{_PROMOTED}where": f"{socket.gethostname()}:{home}",
        f"{_PROMOTED}by": who,
    }
    try:
        release = set_champion(model, sha256, facts)
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error
    return f"MLflow: models:/{release.name}/{release.number} is the {CHAMPION}"
