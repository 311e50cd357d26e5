"""Measure the engine alone, without image files, HTTP or JSON: one process with one thread at batch 16.

Started by benchmarks/gateway.py, once per core: each line on stdin is a number of seconds to measure, each line on
stdout images per second.

    python -m benchmarks.serving.engine_alone MODEL_FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from contracts import model as model_contract
from handlers.archive import load_network
from handlers.engines import build_engine

BATCH = 16


def main(folder: Path) -> None:
    """Print `ready`, then a rate for each number of seconds."""
    torch.set_num_threads(1)
    contract = model_contract.load(folder / "contract.json")
    engine = build_engine(
        contract.engine, lambda: load_network(folder, contract), directory=folder, device=torch.device("cpu")
    )
    size = contract.input
    images = np.random.default_rng(0).standard_normal((BATCH, 3, size.height, size.width)).astype(np.float32)
    engine.run(images)
    print("ready", flush=True)
    for line in sys.stdin:
        started, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < float(line):
            engine.run(images)
            done += BATCH
        print(done / elapsed, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
