import sqlite3
from pathlib import Path

import httpx
import pytest
import torch
from mlflow import MlflowClient

from training.tracking.store import connect, environment, experiment_id, tracking_uri, warn_on_failure


def test_the_store_is_the_environments_else_a_file_in_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_file_that_is_no_database_fails_at_once(monkeypatch, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        connect()


def test_a_server_that_is_away_fails_at_once(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(httpx.ConnectError):
        connect()


def test_artifacts_lie_beside_the_database_wherever_a_training_is_started_from():
    client = MlflowClient(tracking_uri())
    found = client.get_experiment(experiment_id(client))
    database = Path(tracking_uri().removeprefix("sqlite:///"))
    assert found.artifact_location == database.with_name("mlartifacts").as_uri()
    assert experiment_id(client) == found.experiment_id, "the experiment is made once"


def test_the_environment_names_versions_hardware_threads_and_the_commit():
    facts = environment()
    assert facts["version_torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert {"version_mlflow", "python", "platform", "processor", "cuda_device", "git_commit"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())


def test_a_failing_call_becomes_one_line_of_warning(caplog):
    def fail():
        raise RuntimeError("the disk is full\nand a trace")

    assert warn_on_failure(lambda: None)
    assert not caplog.records
    assert not warn_on_failure(fail)
    assert [record.getMessage() for record in caplog.records] == ["MLflow: RuntimeError: the disk is full"]
