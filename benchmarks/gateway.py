"""Measure the gateway's cost and its behaviour under overload, beside its rivals on one machine in one run.

The released model behind the whole stack (keys, quotas, metrics and logs on) is measured beside TorchServe directly, a
bare pass-through to it, FastAPI in process with the same engine, and in eager fp32 FastAPI in process and TorchServe
directly. The rivals' TorchServe takes batches of 16 requests, because they send one image per request: with the stack's
own batches of one request they would be slower. Each is warmed up first, because Java compiles at run time. Rounds
alternate between all of them, because a machine's speed drifts; figures are medians over rounds, ratios are medians of
ratios within a round. The load generator runs on the same machine and never retries.

    python benchmarks/gateway.py [MODEL_FOLDER] [--rounds 5] [--seconds 5]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be this file

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from benchmarks.serving.load import Address, Measurement, closed_loop, open_loop
from benchmarks.serving.servers import ROOT, SINGLE_ROWS, Stack, eager_folder, engines, memory_mb, rival, stack

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

CLIENTS = 32
FEW_CLIENTS = 8
BATCH_IMAGES = 32
BATCH_CLIENTS = 2
WARM_UP_S = 20.0
# Shares of the rate with CLIENTS clients. The first share that is answered to NEARLY_ALL, or the last, is sustainable.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
NEARLY_ALL = 0.99
# Times the sustainable rate.
FACTORS = (0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0)
BEFORE_PEAK = 0.9  # share of the best goodput of the curve, at which the normal latency is taken
FLOOD = 10.0
NORMAL_MS = 100  # an answer within this time, or within twice the p99 at half the sustainable rate, is normal
CORES = len(os.sched_getaffinity(0))
GATEWAY, PASS_THROUGH = "gateway", "bare pass-through"
TORCHSERVE, TORCHSERVE_EAGER = "TorchServe direct", "TorchServe direct, eager fp32"
IN_PROCESS, IN_PROCESS_EAGER = "FastAPI in process", "FastAPI in process, eager fp32"
RESULT = Path(__file__).parent / "results" / "gateway.json"
IMAGE = ROOT / "docs" / "overload.png"


def main() -> None:
    """Measure, print, and write the JSON and the image of the overload curve."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=5.0, help="of each measurement; the first second warms up")
    options.add_argument("--warm-up", type=float, default=WARM_UP_S, help="seconds, of each server")
    options.add_argument("--output", type=Path, default=RESULT)
    options.add_argument("--image", type=Path, default=IMAGE)
    options.add_argument("--only", choices=("throughput", "overload"), help="run only one part")
    chosen = options.parse_args()
    rounds, seconds = chosen.rounds, chosen.seconds
    report: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    began = time.monotonic()
    with contextlib.ExitStack() as running:
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory()))
        released = running.enter_context(stack(chosen.folder))
        if chosen.only != "overload":
            eager = eager_folder(chosen.folder, scratch / "eager")
            addresses, in_process = start_everything(running, released, chosen.folder, eager)
            alone = running.enter_context(engines(chosen.folder.resolve(), CORES))
            report |= measure_throughput(
                addresses, released, alone, rounds=rounds, seconds=seconds, warm_up_s=chosen.warm_up
            )
            report["memory_mb"] = {GATEWAY: round(released.memory_mb()), IN_PROCESS: round(memory_mb(in_process))}
            report["memory_by_part_mb"] = {part: round(mb) for part, mb in released.memory_by_part_mb().items()}
        if chosen.only != "throughput":
            report["overload"] = measure_overload(released, rounds, seconds, chosen.warm_up)
    report["wanted"] = compare(report)
    report |= {"model": model_of(chosen.folder), "rounds": rounds, "seconds": seconds, "cores": CORES}
    report["warm_up_s"] = chosen.warm_up
    report |= {"load_average": os.getloadavg()[0], "took_s": round(time.monotonic() - began)}
    report["environment"] = environment_facts()
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if "overload" in report:
        draw(report["overload"], chosen.image)
    show(report)
    print(f"written to {chosen.output}")


def start_everything(
    running: contextlib.ExitStack, released: Stack, folder: Path, eager: Path
) -> tuple[dict[str, Address], int]:
    """Start the rivals, which stay until `running` ends; return all addresses, and the pid of FastAPI in process."""
    direct = running.enter_context(stack(folder, **SINGLE_ROWS))
    other = running.enter_context(stack(eager, **SINGLE_ROWS))
    predictions = f"/predictions/cifar10/{direct.version}"
    pass_to = f"http://127.0.0.1:{direct.inference}{predictions}"
    pass_through, _ = running.enter_context(rival("pass_through", CORES, PASS_TO=pass_to))
    in_process, pid = running.enter_context(rival("in_process", CORES, MODEL_FOLDER=str(folder.resolve())))
    in_process_eager, _ = running.enter_context(rival("in_process", CORES, MODEL_FOLDER=str(eager)))
    return {
        GATEWAY: Address(released.gateway, single("/predict", released.key)),
        PASS_THROUGH: Address(pass_through, single("/predict")),
        TORCHSERVE: Address(direct.inference, single(predictions)),
        IN_PROCESS: Address(in_process, single("/predict")),
        IN_PROCESS_EAGER: Address(in_process_eager, single("/predict")),
        TORCHSERVE_EAGER: Address(other.inference, single(f"/predictions/cifar10/{other.version}")),
    }, pid


def measure_throughput(
    addresses: dict[str, Address],
    released: Stack,
    alone: Sequence[subprocess.Popen[str]],
    *,
    rounds: int,
    seconds: float,
    warm_up_s: float,
) -> dict[str, Any]:
    """Measure single images with CLIENTS clients and with one, and batches beside the engine alone, all in turn."""
    batches = Address(released.gateway, batch(released.key))
    for address in addresses.values():
        closed_loop(address, CLIENTS, warm_up_s)
    many = in_turn(addresses, rounds, lambda address: closed_loop(address, CLIENTS, seconds))
    rivals = {name: addresses[name] for name in (GATEWAY, TORCHSERVE, IN_PROCESS)}
    few = in_turn(rivals, rounds, lambda address: closed_loop(address, FEW_CLIENTS, seconds))
    cost = {clients: cpu_ms(released, addresses[GATEWAY], clients, seconds) for clients in (1, FEW_CLIENTS, CLIENTS)}
    # One client asks the gateway's own TorchServe: Java is as warm there as it is behind the gateway.
    behind = Address(released.inference, single(f"/predictions/cifar10/{released.version}"))
    quick = {GATEWAY: addresses[GATEWAY], PASS_THROUGH: addresses[PASS_THROUGH], TORCHSERVE: behind}
    quick[IN_PROCESS] = addresses[IN_PROCESS]
    one = in_turn(quick, rounds, lambda address: closed_loop(address, 1, seconds))
    closed_loop(batches, BATCH_CLIENTS, warm_up_s)
    pairs = [(closed_loop(batches, BATCH_CLIENTS, seconds), engine_rate(alone, seconds - 1)) for _ in range(rounds)]
    return {
        "clients": {"many_clients": CLIENTS, "few_clients": FEW_CLIENTS, "one_client": 1},
        "many_clients": {name: summary(measurements) for name, measurements in many.items()},
        "ratios": {name: ratio(many[GATEWAY], many[name]) for name in addresses if name != GATEWAY},
        "ratios_each": {name: ratios(many[GATEWAY], many[name]) for name in addresses if name != GATEWAY},
        "few_clients": {name: summary(measurements) for name, measurements in few.items()},
        "few_ratios_each": {name: ratios(few[GATEWAY], few[name]) for name in rivals if name != GATEWAY},
        "one_client": {name: summary(measurements) for name, measurements in one.items()},
        "one_ratios_each": {name: ratios(one[GATEWAY], one[name]) for name in quick if name != GATEWAY},
        "cpu_ms": cost,
        "batch": {
            "images": BATCH_IMAGES,
            "clients": BATCH_CLIENTS,
            "images_per_s": [round(ours.rate() * BATCH_IMAGES, 1) for ours, _ in pairs],
            "engine_images_per_s": [round(rate, 1) for _, rate in pairs],
            "ratio": round(statistics.median(ours.rate() * BATCH_IMAGES / rate for ours, rate in pairs), 3),
            "statuses": [ours.statuses() for ours, _ in pairs],
        },
    }


def cpu_ms(released: Stack, address: Address, clients: int, seconds: float) -> dict[str, float]:
    """Return the milliseconds of CPU that each part of the stack uses for one answer."""
    before = released.cpu_seconds()
    answers = len(closed_loop(address, clients, seconds, warm_up_s=0.0).answers)
    return {part: round(1000 * (used - before[part]) / answers, 2) for part, used in released.cpu_seconds().items()}


def ratio(ours: Sequence[Measurement], its: Sequence[Measurement]) -> float:
    """Return our answers per second over the rival's: the median over the rounds."""
    return round(statistics.median(ratios(ours, its)), 3)


def ratios(ours: Sequence[Measurement], its: Sequence[Measurement]) -> list[float]:
    """Return our answers per second over the rival's, of each round."""
    return [round(a.rate() / max(b.rate(), 1e-9), 3) for a, b in zip(ours, its, strict=True)]


def in_turn(
    addresses: dict[str, Address], rounds: int, measure: Callable[[Address], Measurement]
) -> dict[str, list[Measurement]]:
    """Measure each address once in every round."""
    found: dict[str, list[Measurement]] = {name: [] for name in addresses}
    for _ in range(rounds):
        for name, address in addresses.items():
            found[name].append(measure(address))
            print(f"{name:32s} {found[name][-1].rate():7.1f}/s  {found[name][-1].statuses()}", flush=True)
    return found


def engine_rate(processes: Sequence[subprocess.Popen[str]], seconds: float) -> float:
    """Return the images per second of all engine processes together."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return sum(float(process.stdout.readline()) for process in processes if process.stdout is not None)


def measure_overload(released: Stack, rounds: int, seconds: float, warm_up_s: float) -> dict[str, Any]:
    """Measure the open-loop curve, and a flood at FLOOD times the sustainable rate, which each round measures again."""
    address = Address(released.gateway, single("/predict", released.key))
    closed_loop(address, CLIENTS, warm_up_s)
    rates = []
    points: dict[float, list[Measurement]] = {factor: [] for factor in FACTORS}
    for _ in range(rounds):
        rates.append(sustainable_rate(address, seconds))
        for factor in FACTORS:
            points[factor].append(open_loop(address, factor * rates[-1], seconds))
            last = points[factor][-1]
            print(f"{factor:5.2f}x  {last.rate():7.1f}/s good  p99 {last.latency_ms(0.99) or 0:6.1f} ms", flush=True)
    sustainable = statistics.median(rates)
    peak = max(statistics.median(m.rate() for m in measurements) for measurements in points.values())
    before_peak = []
    for _ in range(rounds):
        before_peak.append(open_loop(address, BEFORE_PEAK * peak, seconds))
        points[FACTORS[-1]].append(open_loop(address, FACTORS[-1] * sustainable, seconds))
    normal_ms = max(NORMAL_MS, *(2 * (m.latency_ms(0.99) or 0.0) for m in points[FACTORS[0]]))
    curve = [{"factor": factor, **summary(measurements)} for factor, measurements in points.items()]
    return {
        "sustainable_per_s": round(sustainable, 1),
        "curve": curve,
        "before_peak": {"of_peak": BEFORE_PEAK, **summary(before_peak)},
        "flood": flood(released, address, sustainable, normal_ms),
    }


def sustainable_rate(address: Address, seconds: float) -> float:
    """Return the requests per second of which, in an open loop, the gateway refuses hardly any."""
    most = closed_loop(address, CLIENTS, seconds).rate()
    for share in SHARES:
        measured = open_loop(address, share * most, seconds)
        if measured.rate() >= NEARLY_ALL * measured.offered():
            break
    return share * most


def flood(released: Stack, address: Address, sustainable: float, normal_ms: float) -> dict[str, Any]:
    """Measure the memory under FLOOD times the rate, and the time until answers are normal again."""
    before = released.memory_mb()
    with sampled(released.memory_mb) as held:
        flooded = open_loop(address, FLOOD * sustainable, 5.0)
    # The generator waits for the flood's last answers; this time counts as not yet normal.
    left_s = max(0.0, max((answered for _, answered, _ in flooded.answers), default=0.0) - flooded.seconds)
    after = open_loop(address, 0.5 * sustainable, 5.0, warm_up_s=0.0)
    well_after_s = normal_after_s(after, normal_ms)
    return {
        "factor": FLOOD,
        **summary([flooded]),
        "memory_mb": {"before": round(before), "most": round(max(held)), "after": round(released.memory_mb())},
        "normal_ms": round(normal_ms, 1),
        "last_answer_after_s": round(left_s, 2),
        "normal_after_s": None if well_after_s is None else round(left_s + well_after_s, 2),
        "statuses_after": after.statuses(),
        "p99_after_ms": after.latency_ms(0.99),
    }


def normal_after_s(after: Measurement, normal_ms: float) -> float | None:
    """Return when a second began in which 99 of 100 requests got a good answer; None if there was none."""
    for start in (tenth / 10 for tenth in range(int(10 * (after.seconds - 1)))):
        well = [
            status == 200 and (answered - due) * 1000 <= normal_ms
            for due, answered, status in after.answers
            if start <= due < start + 1
        ]
        if well and sum(well) >= 0.99 * len(well):
            return start
    return None


@contextlib.contextmanager
def sampled(measure: Callable[[], float]) -> Iterator[list[float]]:
    """Yield a list that gets values of `measure` during the block: four a second, at least one."""
    values, stop = [measure()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.25):
            values.append(measure())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield values
    finally:
        stop.set()
        thread.join()


def summary(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return medians over the rounds, and each round's rate."""

    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 2) if known else None

    statuses: dict[str, int] = {}
    for measurement in measurements:
        for status, count in measurement.statuses().items():
            statuses[status] = statuses.get(status, 0) + count
    return {
        "good_per_s": median([m.rate() for m in measurements]),
        "good_per_s_each": [round(m.rate(), 1) for m in measurements],
        "offered_per_s": median([m.offered() for m in measurements]),
        "not_offered": sum(m.not_sent for m in measurements),
        "p50_ms": median([m.latency_ms(0.5) for m in measurements]),
        "p99_ms": median([m.latency_ms(0.99) for m in measurements]),
        "statuses": statuses,
        "generator_cores": median([m.generator_cpu for m in measurements]),
    }


def compare(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with its measured figure."""
    goals: list[tuple[str, float | None, str, float]] = []
    if ratios := report.get("ratios"):
        goals += [
            (f"requests/s at {CLIENTS} clients, times {PASS_THROUGH}", ratios[PASS_THROUGH], "at least", 0.9),
            (f"requests/s, times {IN_PROCESS_EAGER}", ratios[IN_PROCESS_EAGER], "at least", 3.0),
            (f"requests/s, times {TORCHSERVE_EAGER}", ratios[TORCHSERVE_EAGER], "at least", 2.5),
            (f"requests/s, times {IN_PROCESS} with the same engine", ratios[IN_PROCESS], "at least", 0.8),
            ("images/s of /predict/batch, times the engine alone", report["batch"]["ratio"], "at least", 0.75),
        ]
        engine = statistics.median(report["batch"]["engine_images_per_s"])
        few = {name: statistics.median(each) for name, each in report["few_ratios_each"].items()}
        memory = report["memory_mb"]
        one = report["one_client"]
        goals += [
            (
                f"requests/s at {CLIENTS} clients, times the engine alone",
                round(report["many_clients"][GATEWAY]["good_per_s"] / engine, 3),
                "at least",
                0.8,
            ),
            (f"requests/s at {FEW_CLIENTS} clients, times {IN_PROCESS}", few[IN_PROCESS], "at least", 0.9),
            (f"requests/s at {FEW_CLIENTS} clients, times {TORCHSERVE}", few[TORCHSERVE], "at least", 1.0),
            (f"requests/s at {CLIENTS} clients, times {TORCHSERVE}", ratios[TORCHSERVE], "at least", 1.0),
            (
                f"p50 with one client, times {IN_PROCESS}",
                round(one[GATEWAY]["p50_ms"] / one[IN_PROCESS]["p50_ms"], 2),
                "at most",
                1.3,
            ),
            (f"memory, times {IN_PROCESS}", round(memory[GATEWAY] / memory[IN_PROCESS], 2), "at most", 1.3),
        ]
        extra = round(one[GATEWAY]["p50_ms"] - one[TORCHSERVE]["p50_ms"], 2)
        goals.append(("ms of p50 with one client above TorchServe direct", extra, "at most", 1.5))
    if overload := report.get("overload"):
        curve = {point["factor"]: point for point in overload["curve"]}
        peak = max(point["good_per_s"] for point in curve.values())
        beyond = [point for factor, point in curve.items() if factor >= 1]
        # The server cannot answer more than was sent: if the rate was estimated too low, 1x is less than the peak.
        worst = min(point["good_per_s"] / min(peak, point["offered_per_s"]) for point in beyond)
        slowest = max(point["p99_ms"] or float("inf") for point in beyond)
        calm_ms = overload["before_peak"]["p99_ms"]
        goals += [
            ("goodput from 1x to 3x, share of the peak or of what was offered", round(worst, 3), "at least", 0.9),
            ("p99 from 1x to 3x, times that at 0.9 of the peak", round(slowest / calm_ms, 2), "at most", 2.0),
            ("s until normal after a flood", overload["flood"]["normal_after_s"], "at most", 2.0),
        ]
    return [
        {"what": what, "seen": seen, "wanted": f"{how} {limit:g}", "reached": is_reached(seen, how, limit)}
        for what, seen, how, limit in goals
    ]


def is_reached(seen: float | None, how: str, limit: float) -> bool:
    """Return True if the figure reaches the goal."""
    return seen is not None and (seen >= limit if how == "at least" else seen <= limit)


def single(path: str, key: str = "") -> list[bytes]:
    """Return a request for each sample image, all different."""
    return [post(path, image, "image/png", key) for image in images()]


def batch(key: str) -> list[bytes]:
    """Return requests for /predict/batch, each with other images."""
    files, requests = images(), []
    for start in range(0, len(files), 7):
        parts = [
            b'--xx\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + files[index % len(files)]
            for index in range(start, start + BATCH_IMAGES)
        ]
        body = b"\r\n".join(parts) + b"\r\n--xx--\r\n"
        requests.append(post("/predict/batch", body, "multipart/form-data; boundary=xx", key))
    return requests


def post(path: str, body: bytes, media_type: str, key: str) -> bytes:
    """Return a whole POST request."""
    head = [f"POST {path} HTTP/1.1", "host: localhost", f"content-type: {media_type}", f"content-length: {len(body)}"]
    head += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join(head).encode("ascii") + b"\r\n\r\n" + body


def images() -> list[bytes]:
    """Return the sample images, 32 by 32 pixels each."""
    return [path.read_bytes() for path in sorted((ROOT / "tests" / "samples").glob("*/*.png"))]


def model_of(folder: Path) -> dict[str, Any]:
    """Return the measured model's name, version, architecture and engine."""
    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    return {name: contract[name] for name in ("name", "version", "architecture", "engine")}


def environment_facts() -> dict[str, str]:
    """Return hardware and versions."""
    # Not at the top: its imports would take memory and caches from the measured processes.
    from training.tracking.store import environment  # noqa: PLC0415

    return {name: value for name, value in environment().items() if name != "threads"}


def draw(overload: dict[str, Any], path: Path) -> None:
    """Draw the overload curve: good answers and p99 over the rate that was really sent."""
    from matplotlib.figure import Figure  # noqa: PLC0415 — see above

    offered = [point["offered_per_s"] for point in overload["curve"]]
    figure = Figure(figsize=(7, 5), layout="constrained")
    rates, times = figure.subplots(2, 1, sharex=True)
    rates.plot(offered, offered, color="0.7", linestyle=":", label="offered")
    rates.plot(offered, [point["good_per_s"] for point in overload["curve"]], marker="o", label="answered with 200")
    rates.axvline(overload["sustainable_per_s"], color="0.7", linewidth=1)
    rates.set_ylabel("requests/s")
    rates.set_ylim(0, 1.4 * max(point["good_per_s"] for point in overload["curve"]))
    rates.legend(loc="lower right")
    for quantile in ("p50", "p99"):
        times.plot(offered, [point[f"{quantile}_ms"] for point in overload["curve"]], marker="o", label=quantile)
    times.axvline(overload["sustainable_per_s"], color="0.7", linewidth=1)
    times.set_ylabel("ms of answers with 200")
    times.set_xlabel("requests/s offered; the line is the sustainable rate")
    times.set_ylim(0)
    times.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    titles = {"many_clients": f"{CLIENTS} clients", "few_clients": f"{FEW_CLIENTS} clients", "one_client": "one client"}
    for key, title in titles.items():
        for name, row in report.get(key, {}).items():
            times = f"p50 {row['p50_ms']:6.1f}  p99 {row['p99_ms']:6.1f} ms"
            print(f"{title:12s} {name:32s} {row['good_per_s']:7.1f}/s  {times}")
    for clients, parts in report.get("cpu_ms", {}).items():
        print(f"ms of CPU for an answer, {clients} clients: {parts}")
    for point in report.get("overload", {}).get("curve", []):
        print(
            f"{point['factor']:5.2f}x  offered {point['offered_per_s']:7.1f}/s  good {point['good_per_s']:7.1f}/s  "
            f"p50 {point['p50_ms']} ms  p99 {point['p99_ms']} ms"
        )
    if "overload" in report:
        print(f"{BEFORE_PEAK} of the peak: {report['overload']['before_peak']}")
        print(f"flood: {report['overload']['flood']}")
    for goal in report["wanted"]:
        verdict = "reached" if goal["reached"] else "MISSED"
        print(f"{verdict:8s} {goal['what']}: {goal['seen']} (wanted {goal['wanted']})")


if __name__ == "__main__":
    main()
