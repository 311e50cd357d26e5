"""Releases in MLflow's registry: one model version each, with its archive, hash and gate report, and who is champion.

The registry is a record beside the road: serving and roll-back never wait for it longer than seconds, and every failure
is a `RegistryError`, whatever MLflow raised. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
from mlflow.exceptions import MlflowException

from training.errors import RegistryError
from training.tracking.store import connect, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
RELEASE, ARCHIVE, SHA256 = "release", "archive", "archive_sha256"
# Seconds for one answer: a note beside a roll-back, and a transfer of an archive.
NOTE_WITHIN_S, TRANSFER_WITHIN_S = 5, 60


@dataclass(frozen=True)
class RegisteredVersion:
    """A model version that was packed: `number` is MLflow's, `version` ours, `archive` a path among the run's files."""

    name: str
    number: str
    version: str
    run_id: str
    archive: str
    sha256: str


def log_release(
    name: str, version: str, run_id: str, archive: Path, sha256: str, *, files: Sequence[Path], facts: Mapping[str, str]
) -> RegisteredVersion:
    """Logs archive and files to the run, and notes hash and `facts` on the run's model version.

    A model version stands for one release. Where the run's own stands for another already, a new one is made of it.

    Raises:
        RegistryError: the registry cannot be reached or refuses.
    """
    with registry_client(TRANSFER_WITHIN_S) as client:
        folder = f"releases/{version}"
        number = _number_for(client, name, version, run_id)
        for path in (archive, *files):
            client.log_artifact(run_id, str(path), folder)
        release = RegisteredVersion(name, number, version, run_id, f"{folder}/{archive.name}", sha256)
        tags = {**facts, RELEASE: version, ARCHIVE: release.archive, SHA256: sha256}
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)
        return release


def find_release(name: str, *, alias: str | None = None, number: str | None = None) -> RegisteredVersion:
    """The release that has this alias, or this number.

    Raises:
        RegistryError: the registry cannot be reached, has no such version, or no archive of it.
    """
    with registry_client(TRANSFER_WITHIN_S) as client:
        found = (
            client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number or "")
        )
        return _release(found)


def fetch_archive(release: RegisteredVersion, folder: Path) -> Path:
    """Download the release's archive into `folder`, and its signature if it has one; whoever loads it checks both.

    Raises:
        RegistryError: it cannot be had.
    """
    with registry_client(TRANSFER_WITHIN_S) as client:
        signature = f"{release.archive}.sig"
        beside = client.list_artifacts(release.run_id, str(PurePosixPath(release.archive).parent))
        if any(found.path == signature for found in beside):
            client.download_artifacts(release.run_id, signature, str(folder))
        return Path(client.download_artifacts(release.run_id, release.archive, str(folder)))


def set_champion(name: str, sha256: str, facts: Mapping[str, str]) -> RegisteredVersion:
    """Moves the alias `champion` to the release whose archive has this hash, `previous` to the champion of before.

    `facts` (where, when, by whom) become tags of the new champion.

    Raises:
        RegistryError: the registry cannot be reached, or has no such release.
    """
    with registry_client(NOTE_WITHIN_S) as client:
        found = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(SHA256) == sha256]
        if not found:
            raise RegistryError(f"MLflow has no release of {name} with the archive {sha256[:12]}…")
        release = _release(found[0])
        before = _holder(client, name, CHAMPION)
        if before not in {None, release.number}:
            client.set_registered_model_alias(name, PREVIOUS, before)
        client.set_registered_model_alias(name, CHAMPION, release.number)
        for key, value in facts.items():
            client.set_model_version_tag(name, release.number, key, value)
        return release


def _number_for(client: MlflowClient, name: str, version: str, run_id: str) -> str:
    """The number of the run's model version that stands for the release `version`; made where there is none free."""
    versions = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == name]
    if not versions:
        raise RegistryError(f"MLflow has no registered version of {name} from the run {run_id}")
    for wanted in (version, None):
        found = [v for v in versions if v.tags.get(RELEASE) == wanted]
        if found:
            return str(found[0].version)
    newest = versions[0]
    return str(client.create_model_version(name, newest.source or "", run_id, model_id=newest.model_id).version)


def _release(found: ModelVersion) -> RegisteredVersion:
    tags = found.tags
    missing = [key for key in (RELEASE, ARCHIVE, SHA256) if key not in tags]
    if missing:
        where = f"models:/{found.name}/{found.version}"
        raise RegistryError(f"{where} has no archive: pack it with `gradserve package {where} --version …`")
    path = PurePosixPath(tags[ARCHIVE])
    if path.is_absolute() or ".." in path.parts:
        raise RegistryError(f"models:/{found.name}/{found.version} names the archive {tags[ARCHIVE]!r}")
    return RegisteredVersion(
        found.name, str(found.version), tags[RELEASE], found.run_id or "", tags[ARCHIVE], tags[SHA256]
    )


def _holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """The number of the model version that has the alias."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}:
            return None
        raise


@contextlib.contextmanager
def registry_client(within_s: int) -> Iterator[MlflowClient]:
    """A client that gives up after seconds, where MLflow's own settings allow minutes of retries.

    Raises:
        RegistryError: whatever went wrong.
    """
    uri = tracking_uri()
    limits = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(within_s),
    }
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update({name: value for name, value in limits.items() if before[name] is None})
    try:
        yield connect()
    except RegistryError:
        raise
    except httpx.HTTPError as error:
        raise RegistryError(f"MLflow at {_shown(uri)} does not answer ({type(error).__name__})") from error
    except Exception as error:
        raise RegistryError(f"MLflow at {_shown(uri)}: {(str(error).splitlines() or [''])[0]}") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _shown(uri: str) -> str:
    """The address without a password."""
    return urlsplit(uri).hostname or uri
