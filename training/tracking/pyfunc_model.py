"""Model that `mlflow.pyfunc.load_model` runs: MLflow keeps this file as code and executes it, without a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np  # noqa: TC002 - MLflow reads the annotations at run time

from contracts import model as model_contract
from handlers.archive import load_network
from handlers.engines import build_engine, predict_all
from handlers.preprocess import normalise


class Classifier(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined, misc]
    """The model of a run, run by the engine that its contract names."""

    def load_context(self, context: Any) -> None:  # noqa: ANN401 - MLflow's
        """Reads contract and weights from the logged files."""
        folder = Path(context.artifacts["model"])
        self._contract = model_contract.load(folder / "contract.json")
        self._engine = build_engine(
            self._contract.engine, lambda: load_network(folder, self._contract), directory=folder, device="cpu"
        )

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:  # noqa: ANN401, ARG002
        """The classes' probabilities (N, K) for images (N, H, W, 3) uint8 of the contract's size."""
        return predict_all(self._engine, normalise(model_input, self._contract.input))


mlflow.models.set_model(Classifier())
