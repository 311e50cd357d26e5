"""Measure how each kind of hostile load slows down a stranger: a normal caller with its own key.

The stranger sends 20 images a second to `/predict`. Its median and the share of its calls that are answered are
measured alone, and then beside each load, in turn. The attackers have another key, or none if the route needs none.
They wait 20 ms between an answer and their next request, as from another network: otherwise their generator would take
the two cores from the stack. The stack runs with the usual soft limit of 1,024 open files.

    python benchmarks/hostile.py [--label after] [--seconds 20] [--rounds 3] [--only NAME]
    python benchmarks/hostile.py --short          # one round of 5 s each, for a shared machine

The result is kept under its label beside those of other labels (`before`, `after`) in benchmarks/results/hostile.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be this file

import argparse
import asyncio
import contextlib
import http.client
import io
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.serving.load import Address, Measurement, closed_loop, open_loop
from benchmarks.serving.servers import ROOT, Stack, stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESULT = Path(__file__).parent / "results" / "hostile.json"
SAMPLES = sorted((ROOT / "tests" / "samples").glob("*/*.png"))
STRANGER_PER_S = 20.0
ROUND_TRIP_S = 0.02
WARM_UP_S = 20.0
SOFT_LIMIT = 1024
MOST_TIMES = 2.5  # goal: the stranger's median, times its median alone
LEAST_ANSWERED = 0.99
BOUNDARY = "b0undary"


@dataclass(frozen=True)
class Load:
    """Hostile load: `clients` that send `request` repeatedly, or only hold connections (`request` None)."""

    what: str
    clients: int
    path: str
    body: Callable[[], bytes] | None = None
    holds: bool = False


def image(mode: str, size: tuple[int, int], name: str, **options: Any) -> bytes:  # noqa: ANN401 — Pillow's own
    """Return an image file of one colour."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, name, **options)
    return file.getvalue()


def form(files: list[bytes]) -> bytes:
    """Return the multipart body of a batch."""
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'.encode()
    return b"".join(head + file + b"\r\n" for file in files) + f"--{BOUNDARY}--\r\n".encode()


def tiny_webp(height: int) -> bytes:
    """Return a WebP file of about 40 bytes with 16,383 x `height` pixels."""
    return image("RGB", (16_383, height), "WEBP", lossless=True, method=0)


def long_png() -> bytes:
    """Return a PNG file of 43 million pixels in one row."""
    return image("L", (43_000_000, 1), "PNG")


LOADS = {
    "tiny WebPs of 50 megapixels": Load("1", 4, "/predict", lambda: tiny_webp(3_050)),
    "tiny WebPs of 25 megapixels": Load("1, at the bound", 4, "/predict", lambda: tiny_webp(1_525)),
    "batches of tiny WebPs": Load("1", 1, "/predict/batch", lambda: form([tiny_webp(3_050)] * 256)),
    "batches of tiny WebPs at the bound": Load(
        "1, at the bound", 4, "/predict/batch", lambda: form([tiny_webp(1_525)] * 8)
    ),
    "batches of 2-megapixel WebPs": Load("1, at the bound", 4, "/predict/batch", lambda: form([tiny_webp(128)] * 95)),
    "43,000,000 x 1 pixels, predict": Load("2", 4, "/predict", long_png),
    "43,000,000 x 1 pixels, explain": Load("2", 4, "/explain", long_png),
    "idle connections": Load("3", 2_100, "/livez", holds=True),
    "/openapi.json": Load("7", 16, "/openapi.json"),
    "/docs' program": Load("7", 16, "/docs/swagger-ui-bundle.js"),
    "/health": Load("7", 16, "/health"),
    "no key": Load("7", 16, "/metrics"),
    "floods of batches": Load(
        "batches", 8, "/predict/batch", lambda: form([path.read_bytes() for path in SAMPLES] * 2)
    ),
}


def main() -> None:
    """Measure, print and write the JSON; or attack, in a process of its own."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--label", default="after", help="name of the result in the JSON: before, after")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    options.add_argument("--short", action="store_true", help="one round of 5 s each")
    options.add_argument("--only", choices=LOADS, action="append")
    options.add_argument("--output", type=Path, default=RESULT)
    options.add_argument("--attack", nargs=3, metavar=("NAME", "PORT", "KEY"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.attack:
        name, port, key = chosen.attack
        print(json.dumps(attack(LOADS[name], int(port), key)))
        return
    rounds, seconds = (1, 5.0) if chosen.short else (chosen.rounds, chosen.seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, hard))  # for the stack too
    began = time.monotonic()
    loads = {name: load for name, load in LOADS.items() if not chosen.only or name in chosen.only}
    with stack(ROOT / "model_store" / "released") as running:
        report = measure(running, loads, rounds, seconds, warm_up_s=5.0 if chosen.short else WARM_UP_S)
    report |= {"rounds": rounds, "seconds": seconds, "cores": len(os.sched_getaffinity(0)), "started": now()}
    report |= {"load_average": os.getloadavg()[0], "took_s": round(time.monotonic() - began)}
    kept = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.output.is_file() else {}
    if chosen.only and chosen.label in kept:
        report["loads"] = kept[chosen.label]["loads"] | report["loads"]
    chosen.output.write_text(json.dumps(kept | {chosen.label: report}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {chosen.output}")


def now() -> str:
    """Return the time as the results record it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def measure(running: Stack, loads: dict[str, Load], rounds: int, seconds: float, *, warm_up_s: float) -> dict[str, Any]:
    """Measure the stranger alone and beside each load, in turn within each round."""
    make_key = [sys.executable, "-m", "control.cli.main", "keys", "make", "attacker"]
    made = subprocess.run(make_key, cwd=ROOT, env=running.environment, capture_output=True, text=True, check=True)
    images = [path.read_bytes() for path in SAMPLES]
    stranger = Address(running.gateway, [request("/predict", file, running.key) for file in images])
    closed_loop(stranger, 4, warm_up_s)
    alone: list[Measurement] = []
    beside: dict[str, list[Measurement]] = {name: [] for name in loads}
    attackers: dict[str, Counter[str]] = {name: Counter() for name in loads}
    for _ in range(rounds):
        alone.append(open_loop(stranger, STRANGER_PER_S, seconds))
        for name in loads:
            with attacked(name, running.gateway, made.stdout.strip()) as statuses:
                beside[name].append(open_loop(stranger, STRANGER_PER_S, seconds))
            attackers[name].update(statuses)
            print(f"{name:36s} {one_line(beside[name][-1])}  attackers: {dict(statuses)}", flush=True)
            wait_until_usual(stranger)
    median = statistics.median(quantile_ms(row, 0.5) for row in alone)
    print(f"{'alone':36s} {median:.1f} ms")
    rows = {name: summary(found, median, LOADS[name], attackers[name]) for name, found in beside.items()}
    return {"alone_ms": round(median, 2), "stranger_per_s": STRANGER_PER_S, "loads": rows}


def wait_until_usual(stranger: Address) -> None:
    """Return when the load's requests are worked off: a stranger's call is answered in 0.1 s, or 30 s have passed."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        probe = open_loop(stranger, 5.0, 1.0, warm_up_s=0.0)
        if probe.statuses() == {"200": probe.sent} and (probe.latency_ms(1.0) or 1e9) < 100:
            return


def summary(found: list[Measurement], alone_ms: float, load: Load, statuses: Counter[str]) -> dict[str, Any]:
    """Return one load's figures over all rounds."""
    medians = [quantile_ms(row, 0.5) for row in found]
    median = statistics.median(medians)
    good = sum(len([a for a in row.answers if a[2] == 200 and a[0] >= row.warm_up_s]) for row in found)
    asked = sum(len([a for a in row.answers if a[0] >= row.warm_up_s]) + row.not_sent for row in found)
    times, answered = median / alone_ms, good / max(1, asked)
    return {
        "of": load.what,
        "p50_ms": round(median, 2),
        "p50_ms_of_each_round": [round(value, 2) for value in medians],
        "p99_ms": round(statistics.median(quantile_ms(row, 0.99) for row in found), 1),
        "times_alone": round(times, 2),
        "answered": round(answered, 4),
        "statuses": dict(sum((Counter(row.statuses()) for row in found), Counter())),
        "attackers": dict(statuses),
        "reached": times <= MOST_TIMES and answered >= LEAST_ANSWERED,
    }


def quantile_ms(row: Measurement, quantile: float) -> float:
    """Return a quantile of the milliseconds from due to answered, over good answers due after the warm-up; or 0."""
    times = sorted(answered - due for due, answered, status in row.answers if status == 200 and due >= row.warm_up_s)
    return 1000 * times[min(len(times) - 1, int(len(times) * quantile))] if times else 0.0


def one_line(row: Measurement) -> str:
    """Return a measurement as one line."""
    return f"p50 {quantile_ms(row, 0.5):8.1f} ms  p99 {quantile_ms(row, 0.99):8.1f} ms  {row.statuses()}"


def request(path: str, body: bytes | None, key: str) -> bytes:
    """Return a whole request."""
    kind = f"multipart/form-data; boundary={BOUNDARY}" if path.endswith("/batch") else "application/octet-stream"
    length = f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n" if body is not None else ""
    method = "GET" if body is None else "POST"
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n{length}\r\n".encode() + (body or b"")


@contextlib.contextmanager
def attacked(name: str, port: int, key: str) -> Iterator[Counter[str]]:
    """Run an attack in a process of its own; when it has ended, the yielded counter has the answers' statuses."""
    statuses: Counter[str] = Counter()
    command = [sys.executable, __file__, "--attack", name, str(port), key]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    time.sleep(1.0)
    try:
        yield statuses
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        statuses.update(json.loads(said.splitlines()[-1]))


def attack(load: Load, port: int, key: str) -> Counter[str]:
    """Attack until SIGTERM, and return how often each status was answered."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    body = load.body() if load.body is not None else None
    message = request(load.path, body, key) if not load.path.startswith("/metrics") else request(load.path, body, "no")
    statuses: Counter[str] = Counter()
    if load.holds:
        print("begun", flush=True)
        asyncio.run(hold(load.clients, port, message, over, statuses))
        return statuses
    threads = [
        threading.Thread(target=ask_again, args=(port, message, over, statuses), daemon=True)
        for _ in range(load.clients)
    ]
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    over.wait()
    return Counter(statuses)


def ask_again(port: int, message: bytes, over: threading.Event, statuses: Counter[str]) -> None:
    """Run one client that never stops."""
    while not over.is_set():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            while not over.is_set():
                connection.sendall(message)
                answer = http.client.HTTPResponse(connection)
                try:
                    answer.begin()
                    answer.read()
                except (http.client.HTTPException, OSError):
                    statuses["lost"] += 1
                    break
                statuses[str(answer.status)] += 1
                over.wait(ROUND_TRIP_S)
                if answer.will_close:
                    break
        over.wait(ROUND_TRIP_S)


async def hold(count: int, port: int, message: bytes, over: threading.Event, statuses: Counter[str]) -> None:
    """Hold `count` connections that asked once each, and open another for each that is closed."""

    async def hold_one() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(message)
                statuses["asked"] += 1
                await reader.read()  # to the end of the connection
                writer.close()
                statuses["closed"] += 1
            except OSError:
                statuses["lost"] += 1
            await asyncio.sleep(ROUND_TRIP_S)

    holding = [asyncio.create_task(hold_one()) for _ in range(count)]
    while not over.is_set():  # noqa: ASYNC110 — a signal's handler sets it
        await asyncio.sleep(0.1)
    for task in holding:
        task.cancel()


if __name__ == "__main__":
    main()
