"""Measure the eager engine's speed on a GPU: through the handler, the engine alone, and the bare network.

`handler` goes from PNG bytes to the JSON answer as a TorchServe worker does, `engine` from normalised images in memory
to probabilities, `bare` from images on the GPU to logits on the GPU. A fourth and a fifth engine replay a CUDA graph
for each batch length instead of launching each kernel. Weights are random: speed does not depend on them.

    python benchmarks/engine_gpu.py [--contract model_store/released/contract.json] [--rounds 3]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from ts.context import Context, RequestProcessor

from contracts import model as contracts
from handlers.engines import Outputs, softmax
from handlers.engines.eager import EagerEngine
from handlers.evidence.archive_evidence import ArchiveEvidence
from handlers.image_handler import ImageHandler
from handlers.model import ServedModel
from handlers.network import build_network
from handlers.preprocess import normalise

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "engine_gpu.json"
BATCHES = (1, 8, 32, 64)
SECONDS = 0.15  # per round


class GraphEngine(EagerEngine):
    """Eager engine that records the kernels of each batch length once and replays them."""

    def run(self, images: np.ndarray) -> Outputs:
        """Return the probabilities (N, K) alone."""
        if not hasattr(self, "_graphs"):
            self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        with torch.inference_mode():
            if len(images) not in self._graphs:
                self._graphs[len(images)] = self._record(images)
            graph, given, answer = self._graphs[len(images)]
            given.copy_(torch.from_numpy(images))
            graph.replay()
            return Outputs(softmax(answer.float().cpu().numpy(), self._temperature))

    def _record(self, images: np.ndarray) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        given = torch.from_numpy(images).to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # a graph must not be the first to use a library
            for _ in range(3):
                self._module(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self._module(given)
        return graph, given, answer


ENGINES = {
    "eager fp32": (EagerEngine, "fp32"),
    "eager bf16": (EagerEngine, "bf16"),
    "graph fp32": (GraphEngine, "fp32"),
    "graph bf16": (GraphEngine, "bf16"),
}


def main() -> None:
    """Measure, print the table and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--contract", type=Path, default=ROOT / "model_store" / "released" / "contract.json")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here: this benchmark needs one")
    contract, device = contracts.load(chosen.contract), torch.device("cuda")
    network = build_network(contract.architecture, len(contract.classes)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 32, 32, 3), np.uint8)
    rates = {}
    for name, (kind, precision) in ENGINES.items():
        engine = kind(network, precision=precision, temperature=1.0, device=device)
        rates[name] = {str(count): measure(engine, contract, pixels[:count], chosen.rounds) for count in BATCHES}
        print(name, json.dumps(rates[name]))
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rounds": chosen.rounds,
        "images_per_s": rates,
    }
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(engine: EagerEngine, contract: contracts.Contract, pixels: np.ndarray, rounds: int) -> dict[str, int]:
    """Return images/s through the handler, the engine and the bare network, medians over rounds."""
    count = len(pixels)
    handler = ImageHandler()
    contract = replace(contract, engine=contracts.Engine(), evidence=None)  # the weights are random
    handler._model = ServedModel(  # noqa: SLF001 - `initialize` wants a whole archive
        contract, engine, lambda: None, ArchiveEvidence(contract, None)
    )
    rows = [{"body": bytearray(encode(image))} for image in pixels]
    context = Context("bench", ".", {}, count, None, "")
    images = normalise(pixels, contract.input)
    ready = torch.from_numpy(images).to(engine._device, engine._dtype).contiguous(memory_format=torch.channels_last)  # noqa: SLF001

    def answer() -> None:
        context.request_processor = [RequestProcessor({"x-gradserve": '{"top_k":1}'}) for _ in rows]
        handler.handle(rows, context)

    def bare() -> None:
        with torch.inference_mode():
            engine._module(ready)  # noqa: SLF001

    calls = {"handler": answer, "engine": lambda: engine.run(images), "bare": bare}
    return {name: rate(call, count, rounds) for name, call in calls.items()}


def rate(call: Callable[[], object], count: int, rounds: int) -> int:
    """Return the median over rounds of images per second, for a `call` that takes `count` of them."""
    for _ in range(3):
        call()
    rates = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < SECONDS:
            call()
            done += count
        torch.cuda.synchronize()
        rates.append(done / (time.perf_counter() - started))
    return round(float(np.median(rates)))


def encode(pixels: np.ndarray) -> bytes:
    """Return the image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
