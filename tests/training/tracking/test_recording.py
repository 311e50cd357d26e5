from pathlib import Path

import pytest
from mlflow import MlflowClient

from training.parallel import ProcessGroup
from training.recipe import Recipe
from training.run_folder import FILES, write_run
from training.tracking.recording import recorded
from training.tracking.store import tracking_uri

RECIPE = Recipe(epochs=1, batch_size=16, precision="fp32", workers=0)
FIGURES = {"loss": 1.0, "accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.6, "seconds": 2.0}


def test_training_that_ends_is_finished_in_mlflow_with_its_files(tiny_run):
    run = tiny_run(RECIPE)
    with recorded(run, registers=False) as record:
        record()
        assert run.run_id
        run.end_epoch(FIGURES)
        write_run(run)
    client = MlflowClient(tracking_uri())
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert {Path(entry.path).name for entry in client.list_artifacts(run.run_id)} == set(FILES)


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_training_that_is_cut_off_says_in_mlflow_how_it_ended(tiny_run, error, status):
    run = tiny_run(RECIPE)

    def cut_off() -> None:
        with recorded(run, registers=False) as record:
            record()
            raise error

    with pytest.raises(error):
        cut_off()
    assert MlflowClient(tracking_uri()).get_run(run.run_id).info.status == status


def test_processes_other_than_the_first_record_nothing(tiny_run):
    run = tiny_run(RECIPE)
    run.group = ProcessGroup(1, 2, run.device)
    with recorded(run, registers=True) as record:
        record()
    assert not run.run_id
