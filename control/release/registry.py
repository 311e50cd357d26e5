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
    """The reference that `what` is; None where it is a version or a file."""
    found = None if what.endswith(".mar") else _REFERENCE.fullmatch(what)
    return Reference(found["name"], found["alias"], found["number"]) if found else None


def is_used() -> bool:
    """Whether there is a registry to tell: a tracking address is set, or the default file is there."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or Path("mlflow.db").is_file()


def find(reference: Reference) -> RegisteredVersion:
    """The registered release.

    Raises:
        RegistryUnusable: MLflow is not there, or has no such release.
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


def references() -> tuple[set[str], set[str]]:
    """Return the SHA-256 of the archives and the ids of the runs that aliases in the registry point to.

    Raises:
        RegistryUnusable: it cannot be asked.
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
    """Return name, bytes of artifacts and what removes them, of each old run that nothing refers to.

    Args:
        runs: ids of the runs that are referred to.
        archives: SHA-256 of the archives that are.
        before: runs that ended later are kept (seconds since 1970).

    Raises:
        RegistryUnusable: MLflow cannot be asked.
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
