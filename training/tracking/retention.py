"""Find and remove the artifacts in MLflow that nothing refers to; all measurements stay.

A run's parameters and metrics take kilobytes and stay. Its artifacts, the models that were logged with it and the model
versions made of them go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from training.errors import RegistryError
from training.tracking.releases import SHA256, TRANSFER_WITHIN_S, registry_client
from training.tracking.store import EXPERIMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow import MlflowClient
    from mlflow.entities import FileInfo, Run
    from mlflow.entities.model_registry import ModelVersion

_PRUNED = "gradserve.pruned"
_PAGE = 1000


@dataclass(frozen=True)
class References:
    """Targets of the registry's aliases: MLflow runs, and SHA-256 of archives."""

    runs: frozenset[str]
    archives: frozenset[str]


@dataclass(frozen=True)
class UnusedRun:
    """A run with `bytes` of artifacts that nothing refers to; `models` are ids, `versions` numbers of `registered`."""

    run_id: str
    name: str
    bytes: int
    models: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]


def find_references() -> References:
    """Return what the aliases (champion, previous, challenger, or one of your own) point to.

    Raises:
        RegistryError: the registry cannot be reached.
    """
    with registry_client(TRANSFER_WITHIN_S) as client:
        aliased = [version for version in _versions(client) if version.aliases]
        archives = (version.tags.get(SHA256) for version in aliased)
        return References(
            frozenset(str(version.run_id) for version in aliased), frozenset(sha for sha in archives if sha)
        )


def find_unused(kept_runs: set[str], kept_archives: set[str], before_ms: int) -> list[UnusedRun]:
    """Return the finished runs of our experiment whose artifacts nothing refers to.

    Args:
        kept_runs: ids of the runs that something outside of MLflow refers to.
        kept_archives: SHA-256 of the archives that are kept; so are the runs that they were packed from.
        before_ms: runs that ended later are kept (ms since 1970).

    Raises:
        RegistryError: the store cannot be reached.
    """
    with registry_client(TRANSFER_WITHIN_S) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        versions = list(_versions(client))
        kept = kept_runs | {
            str(version.run_id) for version in versions if version.aliases or version.tags.get(SHA256) in kept_archives
        }
        models: dict[str, list[str]] = {}
        for model in client.search_logged_models([experiment.experiment_id], max_results=_PAGE):
            models.setdefault(str(model.source_run_id), []).append(model.model_id)
        unused = []
        for run in _runs(client, experiment.experiment_id):
            run_id = run.info.run_id
            if run_id in kept or run.info.status == "RUNNING" or (run.info.end_time or 0) > before_ms:
                continue
            own = tuple(models.get(run_id, []))
            size = _size(partial(client.list_artifacts, run_id))
            size += sum(_size(partial(client.list_logged_model_artifacts, model_id)) for model_id in own)
            if size:
                numbers = tuple((v.name, str(v.version)) for v in versions if v.run_id == run_id)
                unused.append(UnusedRun(run_id, run.info.run_name or run_id, size, own, numbers))
        return unused


def remove(unused: UnusedRun) -> None:
    """Remove the run's artifacts, models and model versions; its figures stay, with a tag that says so.

    Raises:
        RegistryError: the store cannot be reached, or refuses.
    """
    with registry_client(TRANSFER_WITHIN_S) as client:
        for name, number in unused.versions:
            if client.get_model_version(name, number).aliases:
                raise RegistryError(f"models:/{name}/{number} has got an alias meanwhile: nothing of it was removed")
        for name, number in unused.versions:
            client.delete_model_version(name, number)
        for model in unused.models:
            get_artifact_repository(client.get_logged_model(model).artifact_location).delete_artifacts()
            client.delete_logged_model(model)
        get_artifact_repository(client.get_run(unused.run_id).info.artifact_uri).delete_artifacts()
        removed = {"bytes": unused.bytes, "versions": [f"{name}/{number}" for name, number in unused.versions]}
        client.set_tag(unused.run_id, _PRUNED, json.dumps(removed))


def _versions(client: MlflowClient) -> Iterator[ModelVersion]:
    """Every registered version; of each model with its aliases."""
    token = None
    while True:
        page = client.search_model_versions(max_results=_PAGE, page_token=token)
        for version in page:
            yield client.get_model_version(version.name, version.version)  # a search leaves the aliases out
        if not (token := page.token):
            return


def _runs(client: MlflowClient, experiment: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment], max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _size(listing: Callable[[str | None], list[FileInfo]], path: str | None = None) -> int:
    """Return the bytes of all files below `path`."""
    total = 0
    for entry in listing(path):
        total += _size(listing, entry.path) if entry.is_dir else (entry.file_size or 0)
    return total
