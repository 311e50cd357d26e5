"""Read and update MLflow's registry for the operator's commands. Routing never waits for it."""
# ruff: noqa: PLC0415 (MLflow takes seconds to import, and is not installed on every operator's machine)

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.names import NAME, VERSION
from control.errors import RegistryUnusable

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.tracking.releases import RegisteredVersion
    from training.tracking.retention import UnusedRun

_REFERENCE = re.compile(rf"(?P<name>{NAME.pattern})(?:@(?P<alias>{NAME.pattern})|/(?P<number>[0-9]+))")
_PROMOTED = "promoted_"


@dataclass(frozen=True)
class Reference:
    """A registered version as MLflow names it: `NAME@alias` or `NAME/NUMBER`."""

    name: str
    alias: str | None
    number: str | None


def parse_reference(what: str) -> Reference | None:
    """Return the reference that `what` names; None for a version or a file."""
    found = None if what.endswith(".mar") else _REFERENCE.fullmatch(what)
    return Reference(found["name"], found["alias"], found["number"]) if found else None


def is_used() -> bool:
    """Return True if there is a registry: MLFLOW_TRACKING_URI is set, or the default file exists."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or Path("mlflow.db").is_file()


def find(reference: Reference) -> RegisteredVersion:
    """Return the registered version.

    Raises:
        RegistryUnusable: MLflow is not installed, does not answer, or has no such version.
    """
    try:
        from training.errors import RegistryError
        from training.tracking.releases import find_release
    except ImportError as error:
        raise RegistryUnusable("MLflow is not installed here: run `make install` in the clone") from error
    try:
        release = find_release(reference.name, alias=reference.alias, number=reference.number)
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error
    if not VERSION.fullmatch(release.version):
        raise RegistryUnusable(f"models:/{release.name}/{release.number} names the release {release.version!r}")
    return release


def fetch(release: RegisteredVersion, folder: Path) -> Path:
    """Download the version's archive into `folder` and return its path.

    Raises:
        RegistryUnusable: it cannot be downloaded.
    """
    from training.errors import RegistryError
    from training.tracking.releases import fetch_archive

    try:
        return fetch_archive(release, folder)
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error


def references() -> tuple[set[str], set[str]]:
    """Return the SHA-256 of the archives and the ids of the runs that aliases in the registry point to.

    Raises:
        RegistryUnusable: MLflow does not answer.
    """
    try:
        from training.errors import RegistryError
        from training.tracking.retention import find_references
    except ImportError as error:
        raise RegistryUnusable("MLflow is not installed here") from error
    try:
        found = find_references()
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error
    return set(found.archives), set(found.runs)


def unused_runs(runs: set[str], archives: set[str], before: float) -> list[tuple[str, int, Callable[[], None]]]:
    """Return each unused run as its name, the bytes of its artifacts, and a function that removes them.

    Args:
        runs: ids of the runs that are used.
        archives: SHA-256 of the archives that are used.
        before: runs that ended later are kept (seconds since 1970).

    Raises:
        RegistryUnusable: MLflow does not answer.
    """
    from training.errors import RegistryError
    from training.tracking.retention import find_unused, remove

    def remover(unused: UnusedRun) -> Callable[[], None]:
        def call() -> None:
            try:
                remove(unused)
            except RegistryError as error:
                raise RegistryUnusable(str(error)) from error

        return call

    try:
        found = find_unused(runs, archives, int(1000 * before))
    except RegistryError as error:
        raise RegistryUnusable(str(error)) from error
    return [(f"{unused.name} ({unused.run_id})", unused.bytes, remover(unused)) for unused in found]


def move_champion(model: str, sha256: str, *, home: Path, who: str) -> str:
    """Move the alias `champion` to the version with this archive, and return a sentence about it; takes seconds.

    Raises:
        RegistryUnusable: the alias could not be moved.
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
