"""Engines that run the network, in the forward pass that answers and explains. Only the eager one needs torch."""

from handlers.engines.base import (
    MAX_BATCH,
    OPENVINO_FILES,
    Engine,
    Outputs,
    predict_all,
    run_all,
    softmax,
    thread_count,
)
from handlers.engines.build import build_engine

__all__ = (
    "MAX_BATCH",
    "OPENVINO_FILES",
    "Engine",
    "Outputs",
    "build_engine",
    "predict_all",
    "run_all",
    "softmax",
    "thread_count",
)
