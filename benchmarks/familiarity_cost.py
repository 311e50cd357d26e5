"""Measure what familiarity costs a worker: the same archive with it and without it, in turns.

One process with one thread calls the handler as a TorchServe worker does. There is no gateway, so that its time does
not hide the cost. Both take turns batch by batch, because a machine's speed drifts within seconds. A round compares the
median CPU time of a batch with and without familiarity: the cost is the share of the images per second that is lost, as
median and range over rounds.

    python benchmarks/familiarity_cost.py [MODEL_FOLDER] [--rounds 15] [--seconds 1]
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and OpenVINO read it

import argparse
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from ts.context import Context, RequestProcessor

from contracts import model as model_contract
from handlers.archive import load_network
from handlers.engines import build_engine
from handlers.evidence.archive_evidence import load_evidence
from handlers.image_handler import ImageHandler
from handlers.model import ServedModel
from training.data.images import encode_png, load_training_images
from training.tracking.store import environment

if TYPE_CHECKING:
    from contracts.model import Contract
    from handlers.engines import Engine

CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parent / "results" / "familiarity_cost.json"
BATCHES = (1, 8, 32)
LEAST_BATCHES = 5  # of each kind in a round
WANTED = 0.05  # at most, of the images per second without familiarity


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seconds", type=float, default=1.0, help="of each round and batch length")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    contract = model_contract.load(chosen.folder / "contract.json")
    if contract.evidence is None or contract.evidence.familiar is None:
        raise SystemExit(f"{chosen.folder} was packed without familiarity: pack it with gradserve package")
    engine = build_engine(
        contract.engine, lambda: load_network(chosen.folder, contract), directory=chosen.folder, device="cpu"
    )
    without = replace(contract, evidence=replace(contract.evidence, familiar=None))
    handlers = {
        "with": handler_of(chosen.folder, contract, engine),
        "without": handler_of(chosen.folder, without, engine),
    }
    images, _ = load_training_images("cifar10", CACHE)
    rows = [{"body": bytearray(encode_png(image))} for image in images.images[: max(BATCHES)]]
    report = {
        "model": f"{contract.name} {contract.version}",
        "familiar": {"method": contract.evidence.familiar.method, "neighbours": contract.evidence.familiar.neighbours},
        "rounds": chosen.rounds,
        "seconds": chosen.seconds,
        "batches": {str(length): compare(handlers, rows[:length], chosen.rounds, chosen.seconds) for length in BATCHES},
        "wanted": WANTED,
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output}")


def handler_of(folder: Path, contract: Contract, engine: Engine) -> ImageHandler:
    """Return a worker's handler for the version in `folder` with this contract."""
    handler = ImageHandler()
    handler._model = ServedModel(  # noqa: SLF001 - `initialize` wants a whole archive
        contract, engine, lambda: None, load_evidence(folder, contract)
    )
    return handler


def compare(handlers: dict[str, ImageHandler], rows: list[dict], rounds: int, seconds: float) -> dict:
    """Return the images per second of both handlers for batches of these rows, and the cost of familiarity."""
    medians: dict[str, list[float]] = {name: [] for name in handlers}
    for turn in range(rounds + 1):
        times: dict[str, list[float]] = {name: [] for name in handlers}
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or len(times["with"]) < LEAST_BATCHES:
            for name, handler in handlers.items():
                times[name].append(time_batch(handler, rows))
        for name, found in times.items():
            if turn:  # the first round warms up
                medians[name].append(float(np.median(found)))
    costs = 1 - np.divide(medians["without"], medians["with"])
    return {
        "images_per_s": {name: round(len(rows) / float(np.median(found)), 1) for name, found in medians.items()},
        "cost": {
            "median": round(float(np.median(costs)), 4),
            "least": round(float(costs.min()), 4),
            "most": round(float(costs.max()), 4),
        },
    }


def time_batch(handler: ImageHandler, rows: list[dict]) -> float:
    """Return the seconds of CPU time in which the handler answers a batch of these requests."""
    context = Context("bench", ".", {}, len(rows), None, "")
    context.request_processor = [RequestProcessor({"x-gradserve": '{"top_k":1}'}) for _ in rows]
    started = time.process_time()
    handler.handle(rows, context)
    return time.process_time() - started


def show(report: dict) -> None:
    """Print a line for each batch length."""
    for length, row in report["batches"].items():
        cost, rate = row["cost"], row["images_per_s"]
        verdict = "reached" if cost["median"] <= report["wanted"] else "MISSED"
        print(
            f"batch {length:>2s}: {rate['without']:.0f} images/s without, {rate['with']:.0f} with familiarity; cost "
            f"{cost['median']:.1%} ({cost['least']:.1%} to {cost['most']:.1%}), at most {WANTED:.0%}: {verdict}"
        )


if __name__ == "__main__":
    main()
