"""Measure the engine's gain through the real TorchServe, and how much explanations slow down predictions.

Two stacks run side by side with the same settings (one prediction worker with one thread per core): the released
version, and the same weights in eager fp32 with channels_last. They take turns within each round, because a
machine's speed drifts; figures are medians over rounds, ratios medians of ratios within a round. Then the released
stack's gateway answers predictions with and without clients that only ask for explanations. The load
generator runs on the same machine.

    python benchmarks/engine_serving.py [MODEL_FOLDER] [--rounds 5] [--seconds 6]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

import argparse
import contextlib
import http.client
import json
import os
import statistics
import tempfile
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks.gateway import environment_facts, images, model_of, ratio, single, summary
from benchmarks.serving.load import Address, Measurement, closed_loop
from benchmarks.serving.servers import ROOT, SINGLE_ROWS, Stack, eager_folder, stack

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENTS = 32
EXPLAINING_CLIENTS = 4
PREDICTING_CLIENTS = (4, 32)  # a service with little load, and a saturated one
TIMES_AS_FAST = 3.0
TIMES_P99 = 2.0
RESULT = Path(__file__).parent / "results" / "serving.json"


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=6.0, help="of each measurement; the first second warms up")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    rounds, seconds = chosen.rounds, chosen.seconds
    with contextlib.ExitStack() as running:
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory()))
        beside = contextlib.ExitStack()
        with beside:
            direct = beside.enter_context(stack(chosen.folder, **SINGLE_ROWS))
            eager = beside.enter_context(stack(eager_folder(chosen.folder, scratch / "eager"), **SINGLE_ROWS))
            engine = compare_engines(direct, eager, rounds, seconds)
        released = running.enter_context(stack(chosen.folder))
        explaining = [measure_explaining(released, clients, rounds, seconds) for clients in PREDICTING_CLIENTS]
    report = {
        "model": model_of(chosen.folder),
        "rounds": rounds,
        "seconds": seconds,
        "torchserve": engine,
        "explaining": explaining,
        "load_average": os.getloadavg()[0],
        "environment": environment_facts(),
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output}")


def compare_engines(released: Stack, eager: Stack, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure single images with CLIENTS clients, sent directly to each stack's TorchServe."""
    addresses = [Address(its.inference, single(f"/predictions/cifar10/{its.version}")) for its in (released, eager)]
    pairs = [[closed_loop(address, CLIENTS, seconds) for address in addresses] for _ in range(rounds)]
    ours, its = zip(*pairs, strict=True)
    times = ratio(ours, its)
    return {
        "clients": CLIENTS,
        "workers": len(os.sched_getaffinity(0)),
        "released": summary(ours),
        "eager fp32 channels_last": summary(its),
        "times_as_fast": times,
        "times_as_fast_each": [round(own.rate() / other.rate(), 2) for own, other in pairs],
        "wanted": {"at_least": TIMES_AS_FAST, "reached": times >= TIMES_AS_FAST},
    }


def measure_explaining(released: Stack, clients: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure the gateway's predictions for each number of clients, alone and beside EXPLAINING_CLIENTS."""
    address = Address(released.gateway, single("/predict", released.key))
    alone: list[Measurement] = []
    beside: list[Measurement] = []
    explained: Counter[int] = Counter()
    for _ in range(rounds):
        alone.append(closed_loop(address, clients, seconds))
        with explanations(released) as statuses:
            beside.append(closed_loop(address, clients, seconds))
        explained += statuses
    slower = [
        (after.latency_ms(0.99) or float("inf")) / (before.latency_ms(0.99) or float("nan"))
        for before, after in zip(alone, beside, strict=True)
    ]
    times = round(statistics.median(slower), 2)
    return {
        "predicting_clients": clients,
        "explaining_clients": EXPLAINING_CLIENTS,
        "alone": summary(alone),
        "beside": summary(beside),
        "explanations_per_s": round(explained[200] / (rounds * seconds), 1),
        "explanation_statuses": {str(status): count for status, count in sorted(explained.items())},
        "times_p99": times,
        "times_p99_each": [round(each, 2) for each in slower],
        "wanted": {"below": TIMES_P99, "reached": times < TIMES_P99},
    }


@contextlib.contextmanager
def explanations(released: Stack) -> Iterator[Counter[int]]:
    """Run clients that ask for one overlay after the other during the block; yield the statuses that they get."""
    statuses: Counter[int] = Counter()
    stop = threading.Event()
    files = images()

    def ask(number: int) -> None:
        headers = {"content-type": "image/png", "authorization": f"Bearer {released.key}"}
        connection = http.client.HTTPConnection("127.0.0.1", released.gateway, timeout=60)
        while not stop.is_set():
            connection.request("POST", "/explain", files[number % len(files)], headers)
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
            number += EXPLAINING_CLIENTS
        connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(EXPLAINING_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    engine = report["torchserve"]
    print(f"TorchServe, {engine['workers']} workers, {engine['clients']} clients, one image a request")
    for name in ("released", "eager fp32 channels_last"):
        row = engine[name]
        print(f"  {name:26s} {row['good_per_s']:7.1f}/s  p50 {row['p50_ms']:6.1f} ms  p99 {row['p99_ms']:6.1f} ms")
    reached = "reached" if engine["wanted"]["reached"] else "MISSED"
    print(f"  {engine['times_as_fast']} times as fast, at least {TIMES_AS_FAST}: {reached}")
    for row in report["explaining"]:
        alone, beside = row["alone"]["p99_ms"], row["beside"]["p99_ms"]
        reached = "reached" if row["wanted"]["reached"] else "MISSED"
        print(
            f"{row['predicting_clients']} clients predict: p99 {alone} ms alone, {beside} ms beside "
            f"{row['explanations_per_s']} explanations/s; {row['times_p99']} times, below {TIMES_P99}: {reached}"
        )


if __name__ == "__main__":
    main()
