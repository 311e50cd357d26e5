"""Compare gateways from several folders before one TorchServe, to see what a mechanism wins for users.

The gateway of this folder is the reference. Each `--variant` is a folder with another version of `gateway/`,
`contracts/` and `config/` (such as a worktree in which one mechanism is replaced), with settings if it needs any. All
run at the same time before one TorchServe; idle gateways take no time. Rounds alternate between them in a random order,
and each measurement opens new connections once the gateway before it counts as idle. A second run with the same label
adds its rounds. Figures are the median, the least and the most over the rounds; ratios are taken within a round.

    python benchmarks/mechanisms.py --variant 'one process=/tmp/one,GATEWAY_WORKERS=1' [--rounds 5] [--hostile LOAD]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be gateway.py

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import time
from typing import TYPE_CHECKING, Any

from benchmarks.gateway import batch, environment_facts, single
from benchmarks.hostile import LOADS, STRANGER_PER_S, attacked, now, quantile_ms, wait_until_usual
from benchmarks.serving.load import Address, Measurement, closed_loop, open_loop
from benchmarks.serving.servers import ROOT, Stack, cpu_seconds, gateway_of, stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CLIENTS = (8, 24, 32, 48, 100)
BATCHES = "2 clients of batches"
OVERLOAD = "open loop, 3 times the rate of 32 clients"
OVERLOAD_TIMES = 3
# Gateways share the workers with those that have calls in flight. Each reports with its poll, every half second, and
# hears of the others with the next one.
FORGOTTEN_S = 1.5
BATCH_CLIENTS = 2
REFERENCE = "this folder"
RESULT = Path(__file__).parent / "results" / "mechanisms.json"
Rounds = dict[str, dict[str, list[dict[str, float]]]]  # by load and gateway, one entry per round


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--variant", action="append", default=[], metavar="NAME=FOLDER[,SETTING=VALUE…]")
    options.add_argument("--clients", type=int, nargs="*", default=CLIENTS)
    options.add_argument("--batches", action="store_true", help=f"{BATCH_CLIENTS} clients of /predict/batch too")
    options.add_argument("--overload", action="store_true", help=f"{OVERLOAD} too")
    options.add_argument("--hostile", nargs="*", choices=LOADS, default=[], help="loads of hostile.py too")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=2.0, help="of a measurement; the first half second warms up")
    options.add_argument("--seed", type=int, default=0, help="of the order within each round")
    options.add_argument("--label", default="variants", help="name of the result in the JSON")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    report = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.output.is_file() else {}
    kept = report.setdefault(chosen.label, {"started": now(), "cores": len(os.sched_getaffinity(0)), "each_round": {}})
    order = random.Random(chosen.seed)
    with contextlib.ExitStack() as running:
        shared = running.enter_context(stack(ROOT / "model_store" / "released"))
        gateways = {}
        for name, folder, settings in [(REFERENCE, ROOT, {}), *map(parse_variant, chosen.variant)]:
            gateways[name] = running.enter_context(gateway_of(folder, shared, **settings))
            closed_loop(Address(gateways[name][0], single("/predict", shared.key)), 32, 2.0)
        for _ in range(chosen.rounds):
            add(kept["each_round"], measure_clients(gateways, shared, chosen.clients, chosen.seconds, order))
            if chosen.batches:
                add(kept["each_round"], measure_batches(gateways, shared, chosen.seconds, order))
            if chosen.overload:
                add(kept["each_round"], measure_overload(gateways, shared, chosen.seconds, order))
            add(kept["each_round"], measure_hostile(gateways, shared, chosen.hostile, order))
            kept["summary"] = {load: compare(rounds) for load, rounds in kept["each_round"].items()}
            chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    kept["environment"] = environment_facts()
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {chosen.output}")


def parse_variant(variant: str) -> tuple[str, Path, dict[str, str]]:
    """Return name, folder and settings of `NAME=FOLDER[,SETTING=VALUE…]`."""
    name, _, rest = variant.partition("=")
    folder, *settings = rest.split(",")
    return name, Path(folder).resolve(), dict(setting.split("=", 1) for setting in settings)


def add(rounds: Rounds, found: Iterator[tuple[str, str, dict[str, float]]]) -> None:
    """Add a round's figures: of each load and gateway."""
    for load, name, figures in found:
        rounds.setdefault(load, {}).setdefault(name, []).append(figures)
        print(f"{load:36s} {name:28s} {figures}", flush=True)


def shuffled(gateways: dict[str, tuple[int, int]], order: random.Random) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the gateways in a random order, each once the others have reported that they have no calls in flight."""
    for gateway in order.sample(list(gateways.items()), len(gateways)):
        time.sleep(FORGOTTEN_S)
        yield gateway


def measure_clients(
    gateways: dict[str, tuple[int, int]], shared: Stack, clients: Sequence[int], seconds: float, order: random.Random
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Measure /predict with each number of clients at each gateway, in one round."""
    for count in clients:
        for name, (port, pid) in shuffled(gateways, order):
            before = cpu_seconds(pid)
            measured = closed_loop(Address(port, single("/predict", shared.key)), count, seconds, warm_up_s=0.5)
            used = cpu_seconds(pid) - before
            yield (
                f"{count} client{'s' * (count > 1)}",
                name,
                {**figures_of(measured), "cpu_ms": 1000 * used / max(1, good(measured))},
            )


def measure_batches(
    gateways: dict[str, tuple[int, int]], shared: Stack, seconds: float, order: random.Random
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Measure /predict/batch at each gateway, in one round."""
    for name, (port, _) in shuffled(gateways, order):
        measured = closed_loop(Address(port, batch(shared.key)), BATCH_CLIENTS, seconds, warm_up_s=0.5)
        yield BATCHES, name, figures_of(measured)


def measure_overload(
    gateways: dict[str, tuple[int, int]], shared: Stack, seconds: float, order: random.Random
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Measure each gateway under the same overload, in one round."""
    requests = single("/predict", shared.key)
    rate = OVERLOAD_TIMES * closed_loop(Address(gateways[REFERENCE][0], requests), 32, seconds, warm_up_s=0.5).rate()
    for name, (port, _) in shuffled(gateways, order):
        yield OVERLOAD, name, figures_of(open_loop(Address(port, requests), rate, seconds, warm_up_s=0.5))


def measure_hostile(
    gateways: dict[str, tuple[int, int]], shared: Stack, loads: Sequence[str], order: random.Random
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Measure a stranger beside each load of hostile.py at each gateway, in one round."""
    for load in loads:
        for name, (port, _) in shuffled(gateways, order):
            stranger = Address(port, single("/predict", shared.key))
            with attacked(load, port, attacker_key(shared)):
                measured = open_loop(stranger, STRANGER_PER_S, 6.0)
            yield load, name, {**figures_of(measured), "p50_ms": round(quantile_ms(measured, 0.5), 1)}
            wait_until_usual(stranger)


def attacker_key(shared: Stack) -> str:
    """Return the attackers' API key, made at the first call."""
    file = shared.home / "attacker"
    if not file.is_file():
        make_key = [sys.executable, "-m", "control.cli.main", "keys", "make", "attacker"]
        made = subprocess.run(make_key, cwd=ROOT, env=shared.environment, capture_output=True, text=True, check=True)
        file.write_text(made.stdout.strip(), encoding="ascii")
    return file.read_text(encoding="ascii")


def figures_of(measured: Measurement) -> dict[str, float]:
    """Return a measurement's answers per second, its p99 and the share of calls that were not answered by 200."""
    failed = 1 - len(measured.within(200)) / max(1, len(measured.within()))
    return {
        "good_per_s": round(measured.rate(), 1),
        "p99_ms": round(measured.latency_ms(0.99) or 0.0, 1),
        "failed_share": round(failed, 4),
    }


def good(measured: Measurement) -> int:
    """Return the number of calls that were answered by 200."""
    return sum(status == 200 for _, _, status in measured.answers)


def compare(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return each gateway's figures, and its ratios to the reference's, each as [median, least, most]."""
    reference = rounds[REFERENCE]
    summary: dict[str, Any] = {}
    for name, own in rounds.items():
        summary[name] = {figure: spread([each[figure] for each in own]) for figure in own[0]}
        for figure in ("good_per_s", "p99_ms"):
            pairs = [(a[figure], b[figure]) for a, b in zip(own, reference, strict=False) if a[figure] and b[figure]]
            summary[name][f"times_{figure}"] = spread([a / b for a, b in pairs])
    return summary


def spread(values: Sequence[float]) -> list[float]:
    """Return [median, least, most], or nothing if there are no values."""
    return [round(each, 3) for each in (statistics.median(values), min(values), max(values))] if values else []


if __name__ == "__main__":
    main()
