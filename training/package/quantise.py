"""Writes OpenVINO's graph of a network, whole or in 8-bit integers."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from handlers.engines import OPENVINO_FILES
from handlers.engines.with_evidence import OUTPUTS, WithEvidence
from handlers.errors import EngineError
from handlers.preprocess import normalise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from contracts.model import Contract
    from training.data.images import Images

CALIBRATION_IMAGES = 1024
"""More change the ranges of activations no further: NNCF's own default is 300."""


def write_openvino(network: nn.Module, contract: Contract, folder: Path, *, precision: str, training: Images) -> int:
    """Write the file of `precision` to `folder` and return how many of the `training` images calibrated it.

    Raises:
        EngineError: the precision is unknown.
    """
    if precision not in OPENVINO_FILES:
        raise EngineError(f"OpenVINO computes in {', '.join(OPENVINO_FILES)}, not in {precision!r}")
    chosen = training.images[_evenly(len(training), CALIBRATION_IMAGES)] if precision == "int8" else training.images[:0]
    size = (contract.input.height, contract.input.width)
    calibration = normalise(chosen, contract.input)
    path = folder / OPENVINO_FILES[precision]
    write_graph(network, path, calibration, size, sharp_layer=contract.explain.sharp_layer)
    return len(chosen)


def write_graph(
    network: nn.Module,
    path: Path,
    calibration: NDArray[np.float32],
    size: tuple[int, int],
    *,
    sharp_layer: str | None = None,
) -> None:
    """Write the network as OpenVINO's graph for any batch length, quantised if there are images to calibrate with.

    With `sharp_layer`, the graph has the outputs `OUTPUTS`; what evidence needs beside the logits is not quantised.
    """
    module = WithEvidence(network, sharp_layer) if sharp_layer is not None else network
    with _without_telemetry(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both trace the network by ways that torch has come to deprecate
        import openvino  # noqa: PLC0415 - heavy, and needed by nobody who packs the eager engine

        example = torch.zeros(1, 3, *size)
        model = openvino.convert_model(module, example_input=example, input=[openvino.PartialShape([-1, 3, *size])])
        if len(calibration):
            import nncf  # noqa: PLC0415

            logging.getLogger("nncf").setLevel(logging.WARNING)
            data = nncf.Dataset([image[None] for image in calibration])
            whole = nncf.IgnoredScope(names=_beside_logits(model), validate=False)
            # The accurate correction costs seconds at packing and nothing at serving, and leaves less of the integers'
            # error in the logits than the fast one, NNCF's default (docs/explanation/engines.md).
            model = nncf.quantize(
                model,
                data,
                subset_size=len(calibration),
                fast_bias_correction=False,
                ignored_scope=whole,
            )
        for output, name in zip(model.outputs, OUTPUTS, strict=False):  # of a network alone, the logits
            output.get_tensor().set_names({name})
        openvino.save_model(model, path, compress_to_fp16=True)


def _beside_logits(model: Any) -> list[str]:  # noqa: ANN401 - openvino.Model; openvino has no types
    """Return the names of the graph's operations that the first output, the logits, does not depend on."""
    todo, needed = [model.get_results()[0]], set()
    while todo:
        node = todo.pop()
        if node.get_friendly_name() not in needed:
            needed.add(node.get_friendly_name())
            todo += [value.get_node() for value in node.input_values()]
    return [name for node in model.get_ops() if (name := node.get_friendly_name()) not in needed]


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """OpenVINO's converter and NNCF report their use to Google Analytics unless they believe to run in CI."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def _evenly(length: int, wanted: int) -> NDArray[np.intp]:
    """Return at most `wanted` indices, evenly spread over `length`."""
    indices: NDArray[np.intp] = np.linspace(0, length - 1, min(length, wanted)).astype(np.intp)
    return indices
