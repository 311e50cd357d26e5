"""MLflow's artifacts that nothing refers to: found by what aliases and archives say, removed without the figures."""

import time

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from training.errors import RegistryError
from training.tracking.releases import SHA256
from training.tracking.retention import find_references, find_unused, remove
from training.tracking.store import experiment_id, tracking_uri

HOUR_MS = 3_600_000
NOW_MS = int(time.time() * 1000)


@pytest.fixture
def client():
    return MlflowClient(tracking_uri())


@pytest.fixture
def make_run(client, tmp_path):
    """`make_run(hours, alias="", sha256="")`: a run that ended so many hours ago, with a registered version."""

    def make(hours, *, alias="", sha256=""):
        experiment = experiment_id(client)
        run_id = client.create_run(experiment, run_name=f"run-{time.time_ns()}").info.run_id
        weights = tmp_path / "best.pth"
        weights.write_bytes(bytes(3000))
        client.log_batch(run_id, metrics=[Metric("accuracy", 0.9, NOW_MS, 1)])
        client.log_artifact(run_id, str(weights), "deep/down")
        model = client.create_logged_model(experiment, f"model-{time.time_ns()}", source_run_id=run_id)
        client.log_model_artifact(model.model_id, str(weights))
        client.set_terminated(run_id, "FINISHED", end_time=NOW_MS - hours * HOUR_MS)
        name = f"retention-{time.time_ns()}"
        client.create_registered_model(name)
        number = client.create_model_version(name, "somewhere", run_id).version
        if alias:
            client.set_registered_model_alias(name, alias, number)
        if sha256:
            client.set_model_version_tag(name, number, SHA256, sha256)
        return run_id, name, model.model_id

    return make


def unused(kept_runs=(), kept_archives=(), hours=1):
    return {run.run_id: run for run in find_unused(set(kept_runs), set(kept_archives), NOW_MS - hours * HOUR_MS)}


def test_what_is_young_aliased_packed_or_named_is_kept_and_the_rest_is_found(make_run):
    old, _, model = make_run(2)
    young, _, _ = make_run(0)
    aliased, _, _ = make_run(2, alias="mine", sha256="a" * 64)
    packed, _, _ = make_run(2, sha256="b" * 64)
    named, _, _ = make_run(2)
    found = unused(kept_runs=[named], kept_archives=["b" * 64])
    assert {old, young, aliased, packed, named} & set(found) == {old}
    assert (found[old].bytes, found[old].models) == (6000, (model,))
    references = find_references()
    assert aliased in references.runs
    assert "a" * 64 in references.archives
    assert packed not in references.runs


def test_a_removed_run_keeps_its_figures_and_nothing_else(client, make_run):
    run_id, name, model = make_run(2)
    remove(unused()[run_id])
    assert client.list_artifacts(run_id) == []
    assert client.search_model_versions(f"name = '{name}'") == []
    assert model not in {found.model_id for found in client.search_logged_models([experiment_id(client)])}
    run = client.get_run(run_id)
    assert (run.data.metrics, run.info.lifecycle_stage) == ({"accuracy": 0.9}, "active")
    assert '"bytes": 6000' in run.data.tags["gradserve.pruned"]
    assert run_id not in unused()


def test_a_version_that_got_an_alias_meanwhile_stays_with_all_that_it_needs(client, make_run):
    run_id, name, _ = make_run(2)
    found = unused()[run_id]
    client.set_registered_model_alias(name, "champion", "1")
    with pytest.raises(RegistryError, match="has got an alias meanwhile"):
        remove(found)
    assert len(client.list_artifacts(run_id)) == 1
    assert client.get_model_version_by_alias(name, "champion").run_id == run_id
