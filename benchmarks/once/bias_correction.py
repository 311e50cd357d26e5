"""Compare the error after NNCF's two bias corrections (run once; docs/explanation/engines.md has the result).

Both quantise the same weights with the same calibration images, and classify the 5,000 held-out images.

    python benchmarks/once/bias_correction.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import os
import tempfile
import time
from unittest import mock

import nncf
import torch

from contracts import model as model_contract
from contracts.model import Engine
from handlers.archive import load_network
from training.data.images import divide, load_training_images
from training.evaluate.inference import predict_logits
from training.package.engine_gate import add_engine
from training.tracking.store import environment

CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parents[1] / "results" / "bias_correction.json"


def main() -> None:
    """Measure, print a line for each correction and write them as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    contract = model_contract.load(chosen.folder / "contract.json")
    network = load_network(chosen.folder, contract)
    images, size = load_training_images("cifar10", CACHE)
    training, held_out = divide(images, subset=0, validation=0.1, seed=0)
    logits = predict_logits(network, held_out.images, size, device=torch.device("cpu")).numpy()
    report = {"model": f"{contract.name} {contract.version}", "held_out_images": len(held_out), "corrections": {}}
    quantize = nncf.quantize
    for name, fast in (("fast", True), ("accurate", False)):

        def corrected(*model: object, fast: bool = fast, **given: object) -> object:
            return quantize(*model, **given | {"fast_bias_correction": fast})

        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(nncf, "quantize", corrected):
            gate = add_engine(
                network, contract, Path(folder), choice=Engine("openvino", "int8"), training=training,
                held_out=held_out, logits=logits, max_drop=1.0,
            )  # fmt: skip
        row = {
            "accuracy": gate.measured.accuracy,
            "agreement": gate.agreement,
            "seconds": round(time.perf_counter() - began, 1),
        }
        report["full_precision"] = gate.reference.accuracy
        report["corrections"][name] = row
        print(f"{name:8s} {row['accuracy']:.2%} right, {row['agreement']:.2%} as full precision, {row['seconds']} s")
    report |= {"environment": environment()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {chosen.output}")


if __name__ == "__main__":
    main()
