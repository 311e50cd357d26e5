"""Measure a handler's resident memory over thousands of explanations, and its slope: explaining must not leak.

python benchmarks/memory.py [MODEL_FOLDER] [--explanations 5000]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contracts import model as model_contract
from contracts.model import Engine
from contracts.wire import Options
from handlers.archive import load_network
from handlers.engines import build_engine
from handlers.explain import METHODS, Explainer
from handlers.model import ServedModel
from handlers.wire import Row
from training.tracking.store import environment

STEP = 50
FLAT = 1024  # bytes per explanation; a graph that is kept would add a million
RESULT = Path(__file__).parent / "results" / "memory.json"


def main() -> None:
    """Explain, print the slope and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--explanations", type=int, default=5000)
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    contract = model_contract.load(chosen.folder / "contract.json")
    network, device = load_network(chosen.folder, contract), torch.device("cpu")
    model = ServedModel(
        contract,
        build_engine(Engine(), network, directory=chosen.folder, device=device),
        lambda: Explainer(network, contract.explain, device=device),
    )
    resident = explain(model, chosen.explanations)
    report = summarise(resident, contract)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"{report['explanations']} explanations: {report['slope_bytes']:+.0f} bytes each, resident "
        f"{report['resident_mb'][0]} to {report['resident_mb'][-1]} MB: {'flat' if report['flat'] else 'GROWING'}"
    )
    print(f"written to {chosen.output}")


def explain(model: ServedModel, count: int) -> list[int]:
    """Return the resident bytes after every `STEP` explanations, with methods, formats and sizes in turn."""
    rng = np.random.default_rng(0)
    methods = [method for method in METHODS if method in model.contract.explain.methods]
    resident = []
    for number in range(count):
        image = rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), dtype=np.uint8)
        choice = Options(method=methods[number % len(methods)], format="json" if number % 7 == 0 else "png")
        (answer,) = model.answer([Row("explain", choice, [encode(image)])])
        if answer.body.startswith(b'{"results":[{"error'):
            raise SystemExit(f"an explanation failed: {answer.body!r}")
        if (number + 1) % STEP == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return resident


def summarise(resident: list[int], contract: model_contract.Contract) -> dict:
    """Return the report; it ignores the first half, in which allocators settle."""
    settled = resident[len(resident) // 2 :]
    slope = float(np.polyfit(np.arange(len(settled)) * STEP, settled, 1)[0])
    return {
        "model": f"{contract.name} {contract.version}",
        "explanations": len(resident) * STEP,
        "slope_bytes": round(slope, 1),
        "flat": slope < FLAT,
        "resident_mb": [round(value / 1e6, 1) for value in resident],
        "environment": environment(),
    }


def encode(pixels: np.ndarray) -> bytes:
    """Return the image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
