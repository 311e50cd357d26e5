"""The archive's entry: TorchServe calls `ImageHandler`, the only class that this module may define.

TorchServe imports this file as the top-level module `image_handler`, so imports are absolute; `handlers/` lies beside
it in the archive. An ImportError in here would be reported as `No module named ts.torch_handler.image_handler`.

contracts/wire.py describes what travels between gateway and handler. Each row of a batch decides by itself: the header
`explain: True`, TorchServe's own, marks an explanation, `describe: True` a question for what is served; they may share
a batch with predictions. Every entry answers all kinds, but only one whose name ends in `-explain` has explanations
ready from its start: what they need takes seconds and 270 MB to load.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contracts.wire
import handlers.wire
from contracts.names import EXPLAIN_SUFFIX
from handlers.model import load_model
from handlers.wire import read_row

if TYPE_CHECKING:
    from handlers.model import ServedModel
    from handlers.wire import RowContext

logger = logging.getLogger(__name__)
_METRICS = logging.getLogger("ts.metrics")

_EXPLAIN_NICENESS = 10
"""Explanations yield the processor to predictions of the same machine."""
_TELL_EVERY_S = 1.0
"""Each value that is told is a line that TorchServe parses: for every batch, that would cost more than decoding."""


class ImageHandler:
    """Answers batches of rows; one instance per worker process."""

    _model: ServedModel
    _told_at = 0.0

    def initialize(self, context: Any) -> None:  # noqa: ANN401 - ts.context.Context, which is there in a worker only
        """Loads, verifies and warms the archive's model.

        Raises:
            RuntimeError: the model cannot be served, and why; TorchServe reports no other kind.
        """
        # TorchServe logs a line per request at INFO.
        logging.getLogger().setLevel(logging.WARNING)
        explains = context.model_name.endswith(EXPLAIN_SUFFIX)
        if explains:
            os.nice(_EXPLAIN_NICENESS)
        directory = Path(context.system_properties["model_dir"])
        for module in (handlers.wire, contracts.wire):
            if Path(str(module.__file__)).resolve().parents[1] != directory.resolve():
                # A PYTHONPATH of the server's environment stands before the archive: other code would answer for it.
                where = f"{module.__name__} was imported from {module.__file__}"
                raise RuntimeError(f"{where}, not from the archive: clear PYTHONPATH")
        try:
            self._model = load_model(
                directory, device=_device(context.system_properties.get("gpu_id")), explains=explains
            )
        except MemoryError:
            raise
        except Exception as error:
            raise RuntimeError(f"{context.model_name} cannot be served: {error}") from error

    def handle(self, data: list[dict[str, Any]], context: RowContext) -> list[bytes]:
        """One answer per row, in order."""
        answers = self._model.answer([read_row(part, context, index) for index, part in enumerate(data)])
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
        tells = context.metrics is not None and time.monotonic() > self._told_at + _TELL_EVERY_S
        # Metrics travel as INFO lines; the one of TorchServe's own comes once this has returned.
        level = logging.INFO if tells else logging.WARNING
        if _METRICS.level != level:  # to set it costs more than one such line
            _METRICS.setLevel(level)
        if tells:
            self._tell_times(context.metrics)
        return [answer.body for answer in answers]

    def _tell_times(self, metrics: Any) -> None:  # noqa: ANN401 - ts.metrics' cache, which is there in a worker only
        """Adds what the stages took since the last time to TorchServe's counters (config/torchserve/metrics.yaml)."""
        from ts.metrics.dimension import Dimension  # noqa: PLC0415 - likewise

        self._told_at = time.monotonic()
        version = self._model.contract.version
        for stage, seconds in self._model.take_seconds().items():
            # In the order in which metrics.yaml names them; a list of its own, for TorchServe adds to it.
            dimensions = [Dimension("stage", stage), Dimension("model_version", version)]
            metrics.add_counter("handler_seconds_total", round(seconds, 6), dimensions=dimensions)


def _device(gpu: int | None) -> str:
    """Return torch's name of the GPU that TorchServe gave this worker, or of the processor."""
    if gpu is None:
        return "cpu"
    import torch  # noqa: PLC0415 - a worker that predicts by OpenVINO does without

    return f"cuda:{gpu}" if torch.cuda.is_available() else "cpu"
