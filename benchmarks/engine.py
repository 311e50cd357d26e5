"""Measure the speed of each engine, from an image's bytes to the JSON answer, and its accuracy.

One process with one thread calls the handler as a TorchServe worker does. All engines take turns within each
round, so that a drift of the machine's speed affects all of them; ratios are medians over rounds of ratios in a round.

    python benchmarks/engine.py [MODEL_FOLDER] [--rounds 15] [--images 10000]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and OpenVINO read it

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ts.context import Context, RequestProcessor

from contracts import model as model_contract
from contracts.model import Engine
from handlers.archive import load_network
from handlers.engines import OPENVINO_FILES, build_engine, predict_all
from handlers.evidence.archive_evidence import ArchiveEvidence, load_evidence
from handlers.image_handler import ImageHandler
from handlers.model import ServedModel
from handlers.preprocess import normalise
from training.data.images import encode_png, load_test_images, load_training_images
from training.evaluate.test_set_log import record_look
from training.package.artifacts import weights_sha256
from training.package.quantise import CALIBRATION_IMAGES, write_graph
from training.tracking.store import environment

BASE = "eager fp32"
ENGINES = {
    BASE: Engine("eager", "fp32"),
    "eager bf16": Engine("eager", "bf16"),
    "openvino fp32": Engine("openvino", "fp32"),
    "openvino bf16": Engine("openvino", "bf16"),
    "openvino int8": Engine("openvino", "int8"),
}
BATCHES = (1, 8, 32)
SECONDS = 0.2  # per engine, batch length and round: short, because speed drifts within seconds
WANTED = {1: 5.0, 8: 4.0}  # goals for int8, times the speed of BASE
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parent / "results" / "engine.json"
LOOKS = Path(__file__).parents[1] / "results" / "test_looks.jsonl"


def main() -> None:
    """Measure, print the table and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--images", type=int, default=10_000, help="test images for the accuracies; 0 for none")
    options.add_argument("--accuracies-of", type=Path, help="a report of the same model to take the accuracies from")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    contract = model_contract.load(chosen.folder / "contract.json")
    known = json.loads(chosen.accuracies_of.read_text(encoding="utf-8")) if chosen.accuracies_of else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = complete(chosen.folder, contract, Path(scratch))
        network = load_network(folder, contract)
        engines = {
            name: build_engine(
                choice, lambda: network, directory=folder, device="cpu", sharp_layer=contract.explain.sharp_layer
            )
            for name, choice in ENGINES.items()
        }
        test = load_test_images("cifar10", CACHE, contract.input)
        evidence = load_evidence(folder, contract)
        handlers = {name: handler_of(contract, engine, evidence) for name, engine in engines.items()}
        rates = measure_rates(handlers, test.images[:32], chosen.rounds)
        accuracies = {
            name: accuracy(engine, test.images[: chosen.images], test.labels[: chosen.images], contract)
            for name, engine in engines.items()
            if chosen.images and known is None
        }
    report = summarise(rates, accuracies, contract, chosen.rounds, min(chosen.images, len(test)))
    if accuracies:
        record_look(
            LOOKS,
            "benchmarks/engine.py: accuracy of each engine",
            model=report["model"],
            weights_sha256=weights_sha256(chosen.folder),
            commit=report["environment"]["git_commit"],
            data="cifar10",
            images=report["accuracy_images"],
            accuracy=accuracies,
        )
    if known is not None:
        take_accuracies(report, known)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output}")


def complete(source: Path, contract: model_contract.Contract, scratch: Path) -> Path:
    """Return a copy of the version's folder with the files of all engines; existing files are kept."""
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, scratch / path.name)
    network, size = load_network(scratch, contract), (contract.input.height, contract.input.width)
    for precision in ("fp32", "int8"):
        path = scratch / OPENVINO_FILES[precision]
        if path.is_file():
            continue
        images, _ = load_training_images("cifar10", CACHE)
        calibration = images.images[:CALIBRATION_IMAGES] if precision == "int8" else images.images[:0]
        inputs = normalise(calibration, contract.input)
        write_graph(network, path, inputs, size, sharp_layer=contract.explain.sharp_layer)
    return scratch


def measure_rates(
    handlers: dict[str, ImageHandler], pixels: np.ndarray, rounds: int
) -> dict[str, dict[int, list[float]]]:
    """Return the images per second of each handler and batch length, one figure per round."""
    rows = [{"body": bytearray(encode_png(image))} for image in pixels]
    rates: dict[str, dict[int, list[float]]] = {name: {length: [] for length in BATCHES} for name in handlers}
    for turn in range(rounds + 1):
        for length in BATCHES:
            for name, handler in handlers.items():
                rate = time_batches(handler, rows[:length])
                if turn:  # the first round warms up
                    rates[name][length].append(rate)
    return rates


def handler_of(contract: model_contract.Contract, engine: object, evidence: ArchiveEvidence) -> ImageHandler:
    """Return a worker's handler with this engine, which says of each image whether it is familiar."""
    handler = ImageHandler()
    handler._model = ServedModel(  # noqa: SLF001 - `initialize` wants a whole archive
        replace(contract, engine=Engine()), engine, lambda: None, evidence
    )
    return handler


def time_batches(handler: ImageHandler, rows: list[dict]) -> float:
    """Return the images per second while the handler answers batches of these requests one after the other."""
    context = Context("bench", ".", {}, len(rows), None, "")
    started, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < SECONDS or not done:
        context.request_processor = [RequestProcessor({"x-gradserve": '{"top_k":1}'}) for _ in rows]
        handler.handle(rows, context)
        done += len(rows)
    return done / elapsed


def accuracy(engine: object, pixels: np.ndarray, labels: np.ndarray, contract: model_contract.Contract) -> float:
    """Return the share of images that the engine classifies correctly."""
    answers = [
        predict_all(engine, normalise(pixels[start : start + 256], contract.input)).argmax(1)
        for start in range(0, len(pixels), 256)
    ]
    return float((np.concatenate(answers) == labels).mean())


def summarise(rates: dict, accuracies: dict, contract: model_contract.Contract, rounds: int, images: int) -> dict:
    """Return the report."""
    engines = {
        name: {
            "accuracy": accuracies.get(name),
            "images_per_s": {str(length): round(float(np.median(rates[name][length])), 1) for length in BATCHES},
            "times_as_fast": {
                length: round(float(np.median(times)), 2) for length, times in times_of(rates, name).items()
            },
            "times_as_fast_range": {
                length: [round(float(times.min()), 2), round(float(times.max()), 2)]
                for length, times in times_of(rates, name).items()
            },
        }
        for name in rates
    }
    fast = engines["openvino int8"]["times_as_fast"]
    return {
        "model": f"{contract.name} {contract.version}",
        "rounds": rounds,
        "accuracy_images": images,
        "base": BASE,
        "engines": engines,
        "wanted": {
            str(length): {"at_least": least, "reached": fast[str(length)] >= least} for length, least in WANTED.items()
        },
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }


def times_of(rates: dict, name: str) -> dict[str, np.ndarray]:
    """Return, by batch length, how many times as fast as BASE the engine was in each round."""
    return {str(length): np.divide(rates[name][length], rates[BASE][length]) for length in BATCHES}


def take_accuracies(report: dict, known: dict) -> None:
    """Copy the accuracies and the commit from an earlier run: they take minutes to measure and do not drift."""
    if known["model"] != report["model"]:
        raise SystemExit(f"that report is about {known['model']}, not {report['model']}")
    for name, row in report["engines"].items():
        row["accuracy"] = known["engines"][name]["accuracy"]
    commit = known.get("accuracy_commit", known["environment"]["git_commit"])
    report |= {"accuracy_images": known["accuracy_images"], "accuracy_commit": commit}


def show(report: dict) -> None:
    """Print the table."""
    print(f"{report['model']}, images/s at batch {' / '.join(map(str, BATCHES))} (times {BASE}), accuracy")
    for name, row in report["engines"].items():
        speeds = " ".join(
            f"{row['images_per_s'][str(length)]:8.0f} ({row['times_as_fast'][str(length)]:.2f}x)" for length in BATCHES
        )
        print(f"{name:14s} {speeds}  {'' if row['accuracy'] is None else format(row['accuracy'], '.2%')}")
    for length, goal in report["wanted"].items():
        print(f"int8 at batch {length}: at least {goal['at_least']}x {'reached' if goal['reached'] else 'MISSED'}")


if __name__ == "__main__":
    main()
