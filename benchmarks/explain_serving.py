"""Measure explanations through the gateway beside predictions: requests a second, and what they cost one another.

One stack serves the model with keys, quotas and logs on. Within each round /predict, /explain as JSON (rows, and in the
compact form) and /explain as PNG take turns, because a machine's speed drifts; figures are medians over rounds, ratios
medians and ranges of ratios within a round. Then 4 clients explain beside 4 that predict, and each kind's p99 is
compared with its own p99 alone. The load generator runs on the same machine.

    python benchmarks/explain_serving.py [MODEL_FOLDER] [--rounds 5] [--seconds 5]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.gateway import environment_facts, model_of, ratios, single, summary
from benchmarks.serving.figures import spread
from benchmarks.serving.load import Address, Measurement, closed_loop
from benchmarks.serving.servers import ROOT, Stack, stack

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIENTS = (8, 32)
BESIDE = 4
LEAST, AIM = 0.5, 0.8
WARM_UP_S = 10.0
PREDICT, JSON, COMPACT, PNG = "predict", "explain, JSON rows", "explain, JSON base64", "explain, PNG"
RESULT = Path(__file__).parent / "results" / "explain_serving.json"


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=5.0, help="of each measurement; the first second warms up")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    with stack(chosen.folder) as served:
        addresses = addresses_of(served)
        for address in addresses.values():
            closed_loop(address, max(CLIENTS), WARM_UP_S)
        report: dict[str, Any] = {
            "throughput": [compare(addresses, clients, chosen.rounds, chosen.seconds) for clients in CLIENTS],
            "beside": beside(addresses, chosen.rounds, chosen.seconds),
        }
    report |= {"model": model_of(chosen.folder), "rounds": chosen.rounds, "seconds": chosen.seconds}
    report |= {"load_average": os.getloadavg()[0], "environment": environment_facts()}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    print(f"written to {chosen.output}")


def addresses_of(served: Stack) -> dict[str, Address]:
    """Return the requests of each kind."""

    def explaining(query: str) -> Address:
        requests = single(f"/explain{query}", served.key)
        return Address(served.gateway, [_with_header(request, b"accept: application/json") for request in requests])

    return {
        PREDICT: Address(served.gateway, single("/predict", served.key)),
        JSON: explaining(""),
        COMPACT: explaining("?heatmap=base64"),
        PNG: Address(served.gateway, single("/explain", served.key)),
    }


def _with_header(request: bytes, header: bytes) -> bytes:
    line, rest = request.split(b"\r\n", 1)
    return line + b"\r\n" + header + b"\r\n" + rest


def compare(addresses: dict[str, Address], clients: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure every kind of call with `clients` clients, in turn within each round."""
    found: dict[str, list[Measurement]] = {name: [] for name in addresses}
    for _ in range(rounds):
        for name, address in addresses.items():
            found[name].append(closed_loop(address, clients, seconds))
    shares = {name: spread(ratios(found[name], found[PREDICT])) for name in addresses if name != PREDICT}
    return {
        "clients": clients,
        "calls": {name: summary(measurements) for name, measurements in found.items()},
        "share_of_predict": shares,
        "wanted": {"at_least": LEAST, "aim": AIM},
    }


def beside(addresses: dict[str, Address], rounds: int, seconds: float) -> dict[str, Any]:
    """Measure `BESIDE` clients that predict and `BESIDE` that explain: each alone, then both at once."""
    kinds = (PREDICT, JSON)
    alone: dict[str, list[Measurement]] = {name: [] for name in kinds}
    both: dict[str, list[Measurement]] = {name: [] for name in kinds}
    with ThreadPoolExecutor(len(kinds)) as threads:
        for _ in range(rounds):
            for name in kinds:
                alone[name].append(closed_loop(addresses[name], BESIDE, seconds))
            running = {name: threads.submit(closed_loop, addresses[name], BESIDE, seconds) for name in kinds}
            for name, measuring in running.items():
                both[name].append(measuring.result())
    return {
        "clients_of_each": BESIDE,
        "alone": {name: summary(measurements) for name, measurements in alone.items()},
        "both": {name: summary(measurements) for name, measurements in both.items()},
        "times_p99": {name: spread(p99_ratios(both[name], alone[name])) for name in kinds},
    }


def p99_ratios(after: Sequence[Measurement], before: Sequence[Measurement]) -> list[float]:
    """Return the ratio of the 99th percentiles within each round."""
    pairs = zip(after, before, strict=True)
    return [round((a.latency_ms(0.99) or float("inf")) / (b.latency_ms(0.99) or float("nan")), 3) for a, b in pairs]


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    for part in report["throughput"]:
        print(f"{part['clients']} clients")
        for name, row in part["calls"].items():
            share = part["share_of_predict"].get(name)
            told = f"{share['median']} of /predict ({share['least']} to {share['most']})" if share else ""
            print(f"  {name:22s} {row['good_per_s']:7.1f}/s  p50 {row['p50_ms']} ms  p99 {row['p99_ms']} ms  {told}")
    part = report["beside"]
    for name, row in part["both"].items():
        alone, times = part["alone"][name]["p99_ms"], part["times_p99"][name]["median"]
        print(f"{BESIDE} + {BESIDE} clients, {name}: p99 {alone} ms alone, {row['p99_ms']} ms beside; {times} times")


if __name__ == "__main__":
    main()
