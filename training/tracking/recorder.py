"""Keeps MLflow equal to what a training has done, through kills, resumptions and stores that go away for a while.

Nothing remembers what was sent. Each update asks the store what it has and sends the rest, so that a store that was out
of reach gets everything once it is back, and a resumed training goes on in the same runs.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlflow import MlflowException
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from training.data.sources import CIFAR10
from training.recipe import EVERYTHING, recipe_to_dict
from training.tracking.store import connect, experiment_id, tracking_uri, warn_on_failure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from mlflow import MlflowClient
    from mlflow.entities import Run

    from training.data.images import Images
    from training.recipe import Phase, Recipe

logger = logging.getLogger(__name__)

History = list[dict[str, float]]
_DIGEST_LENGTH = 36  # the most that MLflow takes
_PHASE_TAG = "phase"
_REGISTERED_TAG = "registered_epoch"


class Recorder:
    """One training in MLflow: a run, a nested run for each phase, the data, and the machine's load as system metrics.

    `run_id` is empty until the store was reached once.
    """

    def __init__(
        self, name: str, recipe: Recipe, facts: dict[str, Any], tags: dict[str, str], parts: dict[str, Images]
    ) -> None:
        """Connects to nothing yet.

        Args:
            name: the run's name.
            recipe: gives the parameters.
            facts: further parameters.
            tags: what the run depends on besides.
            parts: the images by their part in the training, `training` and `validation`.
        """
        self.name = name
        self.recipe = recipe
        self.facts = facts
        self.tags = tags
        self.parts = parts
        self.run_id = ""
        self._monitor: SystemMetricsMonitor | None = None

    def update(self, history: History) -> bool:
        """Sends what the store lacks of the epochs' figures and returns whether that went well."""
        reached = warn_on_failure(lambda: self._update(connect(), history))
        if not reached and self._monitor is not None:
            self._stop_monitor()  # it has given up as well
        return reached

    def finish(self, status: str, files: Iterable[Path]) -> bool:
        """Sends the files and closes the runs as `FINISHED`, `FAILED` or `KILLED`; returns whether that went well."""
        self._stop_monitor()
        return warn_on_failure(lambda: self._finish(connect(), status, files))

    def registered_epoch(self) -> str:
        """The epoch whose weights were registered last; empty when none were."""
        return str(connect().get_run(self.run_id).data.tags.get(_REGISTERED_TAG, ""))

    def mark_registered(self, epoch: str) -> None:
        """Notes that this epoch's weights were registered."""
        connect().set_tag(self.run_id, _REGISTERED_TAG, epoch)

    def _update(self, client: MlflowClient, history: History) -> None:
        run = self._own_run(client)
        self._describe(client, run)
        self._record_phases(client, run.info.experiment_id, history)
        _send(client, self.run_id, history, 1)
        if self._monitor is None:
            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=tracking_uri())
            self._monitor.start()

    def _own_run(self, client: MlflowClient) -> Run:
        if self.run_id:
            try:
                run = client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                    raise
                logger.warning("MLflow: %s has no run %s: a new one gets all", tracking_uri(), self.run_id)
            else:
                _revive(client, run)
                return run
        run = client.create_run(experiment_id(client), run_name=self.name)
        self.run_id = run.info.run_id
        return run

    def _describe(self, client: MlflowClient, run: Run) -> None:
        """Sends the parameters, tags and data that the run lacks; MLflow lets no parameter be changed."""
        wanted = _flat(recipe_to_dict(self.recipe)) | self.facts
        del wanted["cycles"]  # the one thing that may grow; each is a nested run with parameters of its own
        params = [Param(key, str(value)) for key, value in wanted.items() if key not in run.data.params]
        tags = [RunTag(key, value) for key, value in self.tags.items() if run.data.tags.get(key) != value]
        if params or tags:
            client.log_batch(run.info.run_id, params=params, tags=tags)
        if not run.inputs or not run.inputs.dataset_inputs:
            inputs = [dataset_input(part, images, self.recipe.data) for part, images in self.parts.items()]
            client.log_inputs(run.info.run_id, datasets=inputs)

    def _record_phases(self, client: MlflowClient, experiment: str, history: History) -> None:
        """Sends each phase's epochs to its nested run, their steps counted over the whole training."""
        nested = self._nested_runs(client, experiment)
        start = 0
        for number, phase in enumerate(self.recipe.phases(), start=1):
            if start > len(history) or (start == len(history) and number > 1):
                return  # has not begun
            run = nested.get(str(number)) or self._begin(client, experiment, number, phase)
            epochs = history[start : start + phase.epochs]
            self._record_phase(client, run, phase, epochs, start + 1)
            start += phase.epochs

    def _record_phase(self, client: MlflowClient, run: Run, phase: Phase, epochs: History, first: int) -> None:
        run_id = run.info.run_id
        if not run.data.params:
            trained = "all" if phase.trained == EVERYTHING else ",".join(phase.trained)
            params = {"epochs": phase.epochs, "rate": phase.rate, "sizes": phase.sizes, "trained": trained}
            params |= {"warm_up": phase.warm_up, "blend": phase.blend}
            params |= _flat(asdict(phase.augmentation), "augmentation.")
            client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        _send(client, run_id, epochs, first)
        if len(epochs) < phase.epochs:
            _revive(client, run)
        elif run.info.status != "FINISHED":
            client.set_terminated(run_id, "FINISHED")

    def _nested_runs(self, client: MlflowClient, experiment: str) -> dict[str, Run]:
        """The phases' runs by number."""
        found = client.search_runs([experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}'")
        return {run.data.tags[_PHASE_TAG]: run for run in found if _PHASE_TAG in run.data.tags}

    def _begin(self, client: MlflowClient, experiment: str, number: int, phase: Phase) -> Run:
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, _PHASE_TAG: str(number)}
        return client.create_run(experiment, run_name=phase.name, tags=tags)

    def _finish(self, client: MlflowClient, status: str, files: Iterable[Path]) -> None:
        for path in files:
            client.log_artifact(self.run_id, str(path))
        experiment = client.get_run(self.run_id).info.experiment_id
        for run in self._nested_runs(client, experiment).values():
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status)
        client.set_terminated(self.run_id, status)

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def _revive(client: MlflowClient, run: Run) -> None:
    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


def _send(client: MlflowClient, run_id: str, epochs: Sequence[dict[str, float]], first: int) -> None:
    """Sends those of the epochs, counted from `first`, that the run lacks."""
    known = {entry.step for entry in client.get_metric_history(run_id, "loss")}
    now = int(time.time() * 1000)
    for step, figures in enumerate(epochs, start=first):
        if step not in known:
            client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in figures.items()])


def dataset_input(part: str, images: Images, data: str) -> DatasetInput:
    """Return MLflow's record of images: name, digest, shapes, the source of `data`, and their `part`."""
    kind, _, path = data.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow knows two classes of the same name for a path
        source = resolve_dataset_source(path or CIFAR10.url)
    found = from_numpy(
        images.images,
        source=source,
        targets=images.labels,
        name=f"{kind} {part}",
        digest=images.sha256()[:_DIGEST_LENGTH],
    )
    return DatasetInput(Dataset(**found.to_dict()), [InputTag(MLFLOW_DATASET_CONTEXT, part)])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
