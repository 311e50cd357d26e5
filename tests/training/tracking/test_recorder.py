"""A tracking store that goes away in the middle of a training, and comes back."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from training.data.images import Images
from training.recipe import Cycle, Recipe
from training.tracking.recorder import Recorder
from training.tracking.store import tracking_uri

ROOT = Path(__file__).parents[3]
IMAGES = Images(np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1]), ("left", "right"))
EPOCHS = [{"loss": loss, "validation_accuracy": 1 - loss} for loss in (0.9, 0.6, 0.5, 0.4)]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    parts = {"training": IMAGES, "validation": IMAGES}
    recorder = Recorder("test", Recipe(epochs=3, cycles=(Cycle(1, 0.05),)), {"data_sha256": "abc"}, {}, parts)
    yield recorder
    recorder.finish("FINISHED", [])


@pytest.fixture
def database(tmp_path, monkeypatch) -> Path:
    """An own store, which these tests break."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path / "mlflow.db"


def losses(run_id: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri()).get_metric_history(run_id, "loss")
    return [(entry.step, entry.value) for entry in history]


def test_store_broken_for_a_while_gets_what_it_missed(recorder, database, caplog):
    assert recorder.update(EPOCHS[:1])
    whole = database.rename(database.with_name("away"))
    database.write_bytes(b"no database" * 1000)
    assert not recorder.update(EPOCHS[:2])
    assert not recorder.update(EPOCHS[:3])
    assert "MLflow" in caplog.text
    database.unlink()
    whole.rename(database)
    assert recorder.update(EPOCHS)
    assert losses(recorder.run_id) == [(1, 0.9), (2, 0.6), (3, 0.5), (4, 0.4)]


def test_store_that_is_another_one_after_a_resumption_gets_everything(recorder):
    recorder.run_id = "0" * 32  # known to the store that the training began with
    assert recorder.update(EPOCHS[:3])
    assert [step for step, _ in losses(recorder.run_id)] == [1, 2, 3]
    assert MlflowClient(tracking_uri()).get_run(recorder.run_id).data.params["data_sha256"] == "abc"


def test_nothing_is_sent_twice(recorder):
    for _ in range(2):
        recorder.update(EPOCHS[:3])
    client = MlflowClient(tracking_uri())
    run = client.get_run(recorder.run_id)
    nested = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{recorder.run_id}'")
    assert [entry.info.run_name for entry in nested] == ["all"]
    assert losses(recorder.run_id) == losses(nested[0].info.run_id) == [(1, 0.9), (2, 0.6), (3, 0.5)]
    assert len(run.inputs.dataset_inputs) == 2


class Server:
    """A real `mlflow server` on SQLite, which can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.store = f"sqlite:///{folder}/mlflow.db"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store, "--artifacts-destination", "artifacts"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def kill(self) -> None:
        """At once, with its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", **more}


@pytest.mark.long
def test_server_killed_in_the_middle_of_a_training_loses_nothing(server, tmp_path):
    here = environment(MLFLOW_TRACKING_URI=server.url, GRADSERVE_DATA=str(tmp_path / "cache"))
    train = [sys.executable, "-m", "control.cli.main", "train", "--data", f"imagefolder:{ROOT}/tests/samples"]
    train += ["--epochs", "4", "--workers", "0", "--name", "samples", "--output", "run"]
    with (tmp_path / "training.log").open("w") as log:
        training = subprocess.Popen(train, cwd=tmp_path, env=here, stderr=log)
        while not (tmp_path / "run" / "history.json").exists():
            assert training.poll() is None, (tmp_path / "training.log").read_text()
            time.sleep(0.01)
        server.kill()
        assert training.wait() == 0
    assert "--resume run sends it" in (tmp_path / "training.log").read_text()
    server.start()
    again = [sys.executable, "-m", "control.cli.main", "train", "--resume", "run"]
    subprocess.run(again, cwd=tmp_path, env=here, check=True)
    client = MlflowClient(server.store)
    (version,) = client.search_model_versions("name = 'samples'")
    run = client.get_run(version.run_id)
    steps = [entry.step for entry in client.get_metric_history(version.run_id, "validation_accuracy")]
    assert steps == [1, 2, 3, 4]
    (nested,) = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{version.run_id}'")
    assert run.info.status == nested.info.status == "FINISHED"
    assert len(list((tmp_path / "artifacts").rglob("best.pth"))) == 1
