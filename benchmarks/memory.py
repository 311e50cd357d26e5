"""Measure a handler's resident memory over thousands of explanations of every kind, and its slope: none may leak.

Kinds: each method of the contract as numbers and as an overlay, with answer set, similar images and the test, and the
thumbnails of examples.

python benchmarks/memory.py [MODEL_FOLDER] [--explanations 5000]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from contracts import model as model_contract
from contracts.wire import ImageOptions, Options
from handlers.archive import load_network
from handlers.engines import build_engine
from handlers.evidence.archive_evidence import load_evidence
from handlers.explain import Explainer
from handlers.model import ServedModel
from handlers.wire import Row
from training.data.images import encode_png
from training.tracking.store import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        build_engine(contract.engine, lambda: network, directory=chosen.folder, device=device),
        lambda: Explainer(network, contract.explain, device=device),
        load_evidence(chosen.folder, contract),
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
    """Return the resident bytes after every `STEP` explanations, with kinds and sizes in turn."""
    rng = np.random.default_rng(0)
    kinds = [*all_kinds(model)]
    resident = []
    for number in range(count):
        image = encode_png(rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), dtype=np.uint8))
        (answer,) = model.answer([kinds[number % len(kinds)](image)])
        if answer.body.startswith(b'{"results":[{"error'):
            raise SystemExit(f"an explanation failed: {answer.body!r}")
        if (number + 1) % STEP == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return resident


def all_kinds(model: ServedModel) -> Iterator[Callable[[bytes], Row]]:
    """Yield a function from an image to the row that asks for it, for each kind of explanation."""
    for method in model.contract.explain.methods:
        for form in ("json", "png"):
            asked = ImageOptions(explain=True, method=method, coverage=0.95, test=True)
            yield partial(_row, Options(images=(asked,), format=form))
    evidence = model.contract.evidence
    if evidence is not None and evidence.similar is not None and evidence.similar.thumbnails:
        yield lambda _: Row("example", Options(example=0))


def _row(options: Options, image: bytes) -> Row:
    return Row("predict", options, [image])


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


if __name__ == "__main__":
    main()
