"""MLflow's registry, in a SQLite file and behind a real server, and where it is dead."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from mlflow import MlflowClient

from training.errors import RegistryError
from training.tracking.releases import fetch_archive, find_release, log_release, set_champion


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real `mlflow server` over the tests' store, with artifacts of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = ["--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"]]
    artifacts = ["--artifacts-destination", str(tmp_path_factory.mktemp("artifacts"))]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None
        try:
            httpx.get(f"{url}/health").raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(params=["file", pytest.param("server", marks=pytest.mark.long)])
def client(request, monkeypatch):
    uri = request.getfixturevalue("server") if request.param == "server" else os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


@pytest.fixture
def run_id(client, tmp_path, request):
    """A run whose model is registered as `model`."""
    name = f"releases-{time.time_ns()}"
    location = tmp_path.as_uri() if request.node.callspec.params["client"] == "file" else None
    run = client.create_run(client.create_experiment(name, artifact_location=location))
    client.create_registered_model(name)
    client.create_model_version(name, run.info.artifact_uri, run.info.run_id)
    return name, run.info.run_id


def log(name, run_id, version, folder):
    archive = folder / f"{name}-{version}.mar"
    archive.write_bytes(f"the archive of {version}".encode())
    gate = folder / "gate.json"
    gate.write_text("{}")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return log_release(name, version, run_id, archive, sha256, files=[gate], facts={"precision": "int8"})


def test_a_release_is_logged_found_and_fetched(client, run_id, tmp_path):
    name, run_id = run_id
    logged = log(name, run_id, "1.0.0", tmp_path)
    assert find_release(name, number="1") == logged
    there = tmp_path / "there"
    there.mkdir()
    assert fetch_archive(logged, there).read_bytes() == b"the archive of 1.0.0"
    assert client.get_model_version(name, "1").tags["precision"] == "int8"
    assert {entry.path for entry in client.list_artifacts(run_id, "releases/1.0.0")} == {
        f"releases/1.0.0/{name}-1.0.0.mar",
        "releases/1.0.0/gate.json",
    }


def test_a_signature_travels_with_its_archive(client, run_id, tmp_path):
    name, run_id = run_id
    unsigned = log(name, run_id, "1.0.0", tmp_path)
    archive = tmp_path / f"{name}-2.0.0.mar"
    archive.write_bytes(b"signed bytes")
    signature = archive.with_name(f"{archive.name}.sig")
    signature.write_text("signature")
    signed = log_release(name, "2.0.0", run_id, archive, "2" * 64, files=[signature], facts={})
    for release, found in ((unsigned, False), (signed, True)):
        there = tmp_path / release.version
        there.mkdir()
        fetched = fetch_archive(release, there)
        assert fetched.with_name(f"{fetched.name}.sig").is_file() is found


def test_every_release_is_a_model_version_of_its_own_and_packing_again_makes_no_other(client, run_id, tmp_path):
    name, run_id = run_id
    assert [log(name, run_id, version, tmp_path).number for version in ("1.0.0", "1.0.1", "1.0.0")] == ["1", "2", "1"]


def test_the_champion_moves_and_leaves_the_one_before_its_place(client, run_id, tmp_path):
    name, run_id = run_id
    first, second = (log(name, run_id, version, tmp_path) for version in ("1.0.0", "1.0.1"))
    set_champion(name, first.sha256, {"promoted_by": "alice"})
    assert find_release(name, alias="champion") == first
    set_champion(name, second.sha256, {"promoted_by": "bob"})
    set_champion(name, second.sha256, {"promoted_by": "bob"})
    assert find_release(name, alias="champion") == second
    assert find_release(name, alias="previous") == first
    assert client.get_model_version(name, "2").tags["promoted_by"] == "bob"
    with pytest.raises(RegistryError, match="no release"):
        set_champion(name, "0" * 64, {})


def test_what_is_not_there_is_told(client, run_id, tmp_path):
    name, run_id = run_id
    with pytest.raises(RegistryError, match="no archive: pack it"):
        find_release(name, number="1")
    for missing in ({"alias": "champion"}, {"number": "7"}):
        with pytest.raises(RegistryError):
            find_release(name, **missing)
    with pytest.raises(RegistryError, match="no registered version"):
        log("another", run_id, "1.0.0", tmp_path)


@pytest.mark.parametrize("listens", [False, True])
def test_a_dead_registry_costs_seconds(monkeypatch, listens):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:secret@127.0.0.1:{silent.getsockname()[1]}")
        before, began = dict(os.environ), time.monotonic()
        with pytest.raises(RegistryError, match="does not answer") as caught:
            set_champion("model", "0" * 64, {})
    assert time.monotonic() - began < 4
    assert "secret" not in str(caught.value)
    assert dict(os.environ) == before
