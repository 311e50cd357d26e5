"""Measure how answers grow from one replica to two, each pinned to a core of its own, and compare with a model.

One replica (an agent, and TorchServe with one worker) has core 0; a gateway process and the load generator share core
1. Then two replicas have a core each, and the gateway and the generator take what they need of both. So with two cores
two replicas cannot give twice as much. The model takes the processor time for an answer, of a replica, of the gateway
and of the generator, as measured with one replica, and says: one replica gives what the busier core allows; of two
replicas and two cores, the whole of both cores is used. Both are measured in turn; figures are medians and ranges over
the rounds, and the model's error is that of each round.

Beyond two cores the model says what a gateway process and replicas on cores of their own give.

    python benchmarks/replicas.py [MODEL_FOLDER] [--rounds 5] [--seconds 8]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

import argparse
import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.gateway import environment_facts, model_of, single
from benchmarks.serving.figures import spread
from benchmarks.serving.load import Address, Measurement, closed_loop
from benchmarks.serving.servers import ROOT, Replica, cpu_seconds, gateway_before, memory_mb, replica
from control.release.plan_store import PlanStore
from control.stack.stack import prepare_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULT = Path(__file__).parent / "results" / "replicas.json"
CLIENTS = 32  # of each replica
WARM_UP_S = 10.0
FIRST, SECOND = 0, 1
PARTS = ("replica", "gateway", "generator")


@dataclass(frozen=True)
class Site:
    """A gateway process (its port and pid) before replicas, with the cores of the load generator."""

    port: int
    pid: int
    replicas: Sequence[Replica]
    cores: Sequence[int]

    def measure(self, seconds: float) -> tuple[Measurement, dict[str, float]]:
        """Return a measurement, and the milliseconds of processor time that each part used for an answer."""
        os.sched_setaffinity(0, self.cores)
        before = self._used()
        found = closed_loop(Address(self.port, single("/predict")), CLIENTS * len(self.replicas), seconds)
        used = {part: after - before[part] for part, after in self._used().items()}
        used["generator"] = found.generator_cpu * seconds
        return found, {part: 1000 * used[part] / len(found.answers) for part in PARTS}

    def _used(self) -> dict[str, float]:
        return {"replica": sum(cpu_seconds(each.pid) for each in self.replicas), "gateway": cpu_seconds(self.pid)}


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=8.0, help="of each measurement; the first second warms up")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    with contextlib.ExitStack() as running:
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory()))
        home, store = scratch / "home", scratch / "store"
        prepare_plan(PlanStore(home), chosen.folder, store, print)
        first = running.enter_context(replica(home, store, [FIRST], AGENT_WORKERS="1"))
        second = running.enter_context(replica(home, store, [SECOND], AGENT_WORKERS="1"))
        one = Site(*running.enter_context(gateway_before(home, [first], [SECOND])), [first], [SECOND])
        both = [first, second]
        two = Site(*running.enter_context(gateway_before(home, both, [FIRST, SECOND])), both, [FIRST, SECOND])
        for site in (one, two):
            site.measure(WARM_UP_S)
        rounds = [one_round(one, two, chosen.seconds) for _ in range(chosen.rounds)]
        report: dict[str, Any] = {"model": model_of(chosen.folder), "rounds": chosen.rounds, "seconds": chosen.seconds}
        report["start_s"] = [round(each.start_s, 1) for each in both]
        report["memory_mb"] = {"replica": round(memory_mb(first.pid)), "gateway": round(memory_mb(one.pid))}
    report["figures"] = {name: spread([found[name] for found in rounds]) for name in rounds[0]}
    report |= {"load_average": os.getloadavg()[0], "environment": environment_facts()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2), f"written to {chosen.output}", sep="\n")


def one_round(one: Site, two: Site, seconds: float) -> dict[str, float]:
    """Return the answers per second of one and of two replicas, what the model says, and the model's errors."""
    alone, cost = one.measure(seconds)
    both, cost_of_two = two.measure(seconds)
    expected = model(cost)
    found = {f"one replica: ms of the {part} for an answer": cost[part] for part in PARTS}
    found |= {f"two replicas: ms of the {part} for an answer": cost_of_two[part] for part in PARTS}
    for name, measured in (("one replica", alone), ("two replicas", both)):
        found[f"{name}: answers per second"] = measured.rate()
        found[f"{name}: answers per second by the model"] = expected[name]
        found[f"{name}: error of the model"] = expected[name] / measured.rate() - 1
        found[f"{name}: share of answers with status 200"] = len(measured.within(200)) / len(measured.within())
    found["two replicas to one"] = both.rate() / alone.rate()
    found["two replicas to one by the model"] = expected["two replicas"] / expected["one replica"]
    return found


def model(cost: dict[str, float]) -> dict[str, float]:
    """Return the answers per second that the milliseconds of processor time for an answer allow on two cores."""
    asking = cost["gateway"] + cost["generator"]
    return {"one replica": 1000 / max(cost["replica"], asking), "two replicas": 2000 / (cost["replica"] + asking)}


if __name__ == "__main__":
    main()
