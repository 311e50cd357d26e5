"""Compare the engines that were left out with those that serve (run once; docs/explanation/engines.md has the table).

One process, one thread, from prepared images to logits; all in turn within each round. It is not part of `make bench`:
none of our extras has these packages.

    pip install --no-deps --target /tmp/engines onnxruntime==1.32.0 onnx==1.23.2 torchao==0.18.0 flatbuffers ml_dtypes
    PYTHONPATH=/tmp/engines python benchmarks/once/other_engines.py
"""

# ruff: noqa: PLC0415 - each package is imported by the one engine that needs it, which may be missing

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and the others read it
os.environ["TORCHINDUCTOR_FREEZING"] = "1"

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import tempfile
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from contracts import model as model_contract
from contracts.model import Engine
from handlers.archive import load_network
from handlers.engines import build_engine
from handlers.preprocess import normalise
from training.data.images import load_test_images, load_training_images
from training.evaluate.test_set_log import record_look
from training.package.artifacts import weights_sha256
from training.tracking.store import environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Predict = Callable[[np.ndarray], np.ndarray]

BASE = "eager fp32 channels_last"
BATCHES = (1, 8)
CALIBRATION_IMAGES = 256
SECONDS = 0.4
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
RESULT = Path(__file__).parents[1] / "results" / "other_engines.json"
LOOKS = Path(__file__).parents[2] / "results" / "test_looks.jsonl"


def main() -> None:
    """Measure, print the table and write it as JSON, with the error of each engine that cannot run here."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=Path("model_store/released"))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--images", type=int, default=1000, help="test images for the accuracies")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    contract = model_contract.load(chosen.folder / "contract.json")
    network = load_network(chosen.folder, contract)
    images, _ = load_training_images("cifar10", CACHE)
    calibration = normalise(images.images[:CALIBRATION_IMAGES], contract.input)
    test = load_test_images("cifar10", CACHE, contract.input)
    batch = normalise(test.images[: chosen.images], contract.input)
    makers: dict[str, Callable[[], Predict]] = {
        BASE: lambda: build_engine(Engine(), lambda: network, directory=chosen.folder, device="cpu").predict,
        "openvino int8": lambda: build_engine(contract.engine, None, directory=chosen.folder, device="cpu").predict,
        "onnxruntime fp32": lambda: onnxruntime(network, None),
        "onnxruntime int8": lambda: onnxruntime(network, calibration),
        "torch.compile fp32, frozen": lambda: compiled(network, torch.float32),
        "torch.compile bf16, frozen": lambda: compiled(network, torch.bfloat16),
        "torchao int8 (PT2E), compiled": lambda: torchao_int8(network, calibration),
    }
    engines, failed = {}, {}
    for name, make in makers.items():
        began = time.perf_counter()
        try:
            predict = make()
            for length in BATCHES:
                predict(batch[:length])
        except Exception as error:  # noqa: BLE001 - an engine that does not run is a result, not a failure
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            engines[name] = predict
        print(f"{name}: {failed.get(name, 'ready')} after {time.perf_counter() - began:.0f} s", flush=True)
    rates = measure(engines, batch, chosen.rounds)
    report = summarise(engines, rates, batch, test.labels[: chosen.images])
    report |= {"model": f"{contract.name} {contract.version}", "rounds": chosen.rounds, "failed": failed}
    report |= {"load_average": os.getloadavg()[0], "environment": environment()}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    record_look(
        LOOKS,
        "benchmarks/once/other_engines.py: accuracy of each engine",
        model=report["model"],
        weights_sha256=weights_sha256(chosen.folder),
        commit=report["environment"]["git_commit"],
        data="cifar10",
        images=len(batch),
        accuracy={name: row["accuracy"] for name, row in report["engines"].items()},
    )
    for name, row in report["engines"].items():
        speeds = " ".join(f"{row['images_per_s'][n]:8.0f} ({row['times_as_fast'][n]:.2f}x)" for n in map(str, BATCHES))
        print(f"{name:32s} {speeds}  {row['accuracy']:.2%}")
    print(f"written to {chosen.output}")


def compiled(network: nn.Module, dtype: torch.dtype) -> Predict:
    """Return torch.compile's network with frozen weights and one graph for each batch length."""
    frozen = torch.compile(network.to(memory_format=torch.channels_last), dynamic=False)

    def predict(images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return frozen(batch).float().numpy()

    return predict


def torchao_int8(network: nn.Module, calibration: np.ndarray) -> Predict:
    """Return the network with torchao's static 8-bit convolutions (PT2E, Inductor's x86), compiled and frozen."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    # The export would treat a batch of one as a constant.
    example = (torch.from_numpy(calibration[:2]).contiguous(memory_format=torch.channels_last),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(network.eval(), example, dynamic_shapes=shapes).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for start in range(0, len(calibration), 32):
            prepared(torch.from_numpy(calibration[start : start + 32]))
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    frozen = torch.compile(converted, dynamic=False)

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return frozen(torch.from_numpy(images).contiguous(memory_format=torch.channels_last)).numpy()

    return predict


def onnxruntime(network: nn.Module, calibration: np.ndarray | None) -> Predict:
    """Return ONNX Runtime's network on the CPU, in fp32 or with static 8-bit QDQ nodes (per channel, signed)."""
    import onnxruntime as runtime

    folder = Path(tempfile.mkdtemp())
    path = folder / "network.onnx"
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, 32, 32),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )
    if calibration is not None:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        class Reader(CalibrationDataReader):
            """Return the next 32 calibration images."""

            def __init__(self) -> None:
                self._parts = iter(np.split(calibration, len(calibration) // 32))

            def get_next(self) -> dict[str, np.ndarray] | None:
                part = next(self._parts, None)
                return None if part is None else {"images": part}

        quantize_static(str(path), str(folder / "int8.onnx"), Reader(), per_channel=True)
        path = folder / "int8.onnx"
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def measure(engines: dict[str, Predict], batch: np.ndarray, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Return the images per second of each engine and batch length, one figure per round."""
    rates: dict[str, dict[int, list[float]]] = {name: {length: [] for length in BATCHES} for name in engines}
    for turn in range(rounds + 1):
        for length in BATCHES:
            for name, predict in engines.items():
                started, done = time.perf_counter(), 0
                while (elapsed := time.perf_counter() - started) < SECONDS or not done:
                    predict(batch[:length])
                    done += length
                if turn:  # the first round warms up
                    rates[name][length].append(done / elapsed)
    return rates


def summarise(engines: dict[str, Predict], rates: dict, batch: np.ndarray, labels: np.ndarray) -> dict:
    """Return the table: medians, ratios within rounds, and accuracy in batches of a compiled length."""
    length, rows = max(BATCHES), {}
    for name, predict in engines.items():
        answers = [predict(batch[start : start + length]).argmax(1) for start in range(0, len(batch), length)]
        rows[name] = {
            "images_per_s": {str(n): round(float(np.median(rates[name][n])), 1) for n in BATCHES},
            "times_as_fast": {
                str(n): round(float(np.median(np.divide(rates[name][n], rates[BASE][n]))), 2) for n in BATCHES
            },
            "accuracy": float((np.concatenate(answers) == labels).mean()),
        }
    return {"base": BASE, "accuracy_images": len(labels), "engines": rows}


if __name__ == "__main__":
    main()
