"""Release a version and retire another under steady load, and count every error that callers notice.

The generator sends RATE requests a second from CALLERS callers with their own keys through the gateway, and never
retries (nor does the gateway). Meanwhile a second version is deployed as a 10 % canary, promoted, rolled back and
promoted again, and the first one is retired. The report counts failed requests, answers of a version to which no plan
in force gave traffic (following a change may take a second), the canary's callers, and callers that changed sides.
Each run starts a stack of its own; counts are sums over the runs, seconds are medians with the range.

    python benchmarks/releases.py [MODEL_FOLDER] [--runs 5] [--canary-seconds 82]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `releases` would be this file

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from benchmarks.serving.figures import spread
from benchmarks.serving.load import Address, open_loop
from benchmarks.serving.servers import ROOT, Stack, stack
from contracts import plan as traffic_plan
from gateway.auth.keys import load_keys, make_key, save_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

RATE = 50
CALLERS = 2000
SHARE = 10.0
SECOND = "99.0.0"
LONGEST_S = 3600.0
FOLLOWED_WITHIN_S = 1.0
PAUSE_S = 3.0
RESULT = Path(__file__).parent / "results" / "releases.json"
_VERSION = re.compile(rb'"version":"([^"]+)"')


@dataclass(frozen=True)
class Answer:
    """Answer to one caller: when it was due and answered (Unix time), status (0: connection lost), version."""

    caller: int
    due: float
    answered: float
    status: int
    version: str


@dataclass(frozen=True)
class Change:
    """Plan that came into force at `since` (Unix time), and the versions to which it gives traffic."""

    since: float
    revision: int
    versions: frozenset[str]


def main() -> None:
    """Measure, print and write the JSON; exit with 1 if a caller noticed an error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--canary-seconds", type=float, default=82.0, help="how long the canary serves")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    each = [measure(chosen.folder, chosen.canary_seconds) for _ in range(chosen.runs)]
    summary = summarise(each)
    report = {**summary, "each": each, "environment": environment_facts()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2), f"written to {chosen.output}", sep="\n")
    sys.exit(0 if all(map(is_unnoticed, each)) else 1)


def summarise(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts over all runs, and the median and range of the seconds."""
    failed = sum((Counter(run["failed"]) for run in each), Counter[str]())
    return {
        "runs": len(each),
        "requests": sum(run["requests"] for run in each),
        "failed": dict(failed),
        "outside_the_plan": sum(run["outside_the_plan"] for run in each),
        "canary": {
            name: sum(run["canary"][name] for run in each) for name in ("callers_asked", "callers", "changed_sides")
        },
        "p99_ms": spread([run["latency_ms"]["p99"] for run in each]),
        "rollback": {name: spread([run["rollback"][name] for run in each]) for name in each[0]["rollback"]},
        "steps": {
            steps[0]["command"]: spread([step["took_s"] for step in steps])
            for steps in zip(*(run["steps"] for run in each), strict=True)
        },
    }


def measure(folder: Path, canary_s: float) -> dict[str, Any]:
    """Run the whole sequence under load and return the report."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    with stack(folder) as running, tempfile.TemporaryDirectory() as scratch:
        archive = second_archive(folder, Path(scratch))
        address = Address(running.gateway, requests_of(add_callers(running)))
        answers: list[Answer] = []
        with loaded(address, answers):
            steps = move(running, archive, canary_s)
        plans = changes(running.home)
        calls = management_calls(running.home)
    return {
        "started": began,
        "rate_per_s": RATE,
        "requests": len(answers),
        "failed": dict(Counter(str(answer.status) for answer in answers if answer.status != 200)),
        "failures": failures(answers),
        "gateway_retries": 0,  # gateway/inference/torchserve.py sends each upstream batch once
        "outside_the_plan": len(outside_the_plan(answers, plans)),
        "latency_ms": latencies(answers),
        "canary": canary_sides(answers, plans),
        "steps": steps,
        "rollback": rollback_times(answers, plans, steps),
        "management": calls,
    }


def is_unnoticed(report: dict[str, Any]) -> bool:
    """Return True if no caller noticed an error and the canary had its share."""
    canary = report["canary"]
    low, high = canary["callers_expected"]
    return (
        not report["failed"]
        and not report["outside_the_plan"]
        and not canary["changed_sides"]
        and low <= canary["callers"] <= high
        and report["rollback"]["command_s"] < 2
    )


def second_archive(folder: Path, scratch: Path) -> Path:
    """Return the archive of the same model as another version; this benchmark does not compare answers."""
    # Not at the top: the generator's process does not need its imports.
    from training.package.export import package_directory  # noqa: PLC0415

    copy = shutil.copytree(folder, scratch / "second")
    contract = json.loads((copy / "contract.json").read_text(encoding="utf-8"))
    (copy / "contract.json").write_text(json.dumps(contract | {"version": SECOND}), encoding="utf-8")
    return package_directory(copy, scratch / "packed")


def add_callers(running: Stack) -> list[str]:
    """Return the secrets of CALLERS new callers, which the running gateway accepts within a second."""
    path = Path(running.environment["GATEWAY_KEYS_FILE"])
    made = [make_key(f"caller-{number:04d}", ["predict"]) for number in range(CALLERS)]
    save_keys(path, [*load_keys(path), *(key for _, key in made)])
    time.sleep(2.0)
    return [secret for secret, _ in made]


def requests_of(secrets: list[str]) -> list[bytes]:
    """Return one request of each caller, with the sample images in turn."""
    images = [path.read_bytes() for path in sorted((ROOT / "tests" / "samples").glob("*/*.png"))]
    found = []
    for index, secret in enumerate(secrets):
        image = images[index % len(images)]
        head = (
            f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
            f"authorization: Bearer {secret}\r\ncontent-length: {len(image)}\r\n\r\n"
        )
        found.append(head.encode("ascii") + image)
    return found


@contextlib.contextmanager
def loaded(address: Address, answers: list[Answer]) -> Iterator[None]:
    """Send steady load during the block and collect all answers, also those that arrive after its end."""

    def note(number: int, due: float, answered: float, status: int, answer: bytes) -> None:
        now, found = time.time(), _VERSION.search(answer)
        version = found[1].decode() if found else ""
        answers.append(Answer(number % CALLERS, now - (answered - due), now, status, version))

    stop = threading.Event()
    generator = threading.Thread(target=open_loop, args=(address, RATE, LONGEST_S), kwargs={"each": note, "stop": stop})
    generator.start()
    try:
        yield
    finally:
        stop.set()
        generator.join()


def move(running: Stack, archive: Path, canary_s: float) -> list[dict[str, Any]]:
    """Run the sequence of commands and return the seconds of each, including its start."""
    time.sleep(PAUSE_S)
    return [
        gradserve(running, "deploy", str(archive), "--canary", f"{SHARE:g}", then_s=canary_s),
        gradserve(running, "promote"),
        gradserve(running, "rollback"),
        gradserve(running, "promote", SECOND),
        gradserve(running, "retire", running.version),
    ]


def gradserve(running: Stack, *arguments: str, then_s: float = PAUSE_S) -> dict[str, Any]:
    """Run a command beside the stack; a failure ends the benchmark with the command's output."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "control.cli.main", *arguments],
        cwd=running.home, env=running.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    took = time.time() - began
    name = " ".join(Path(argument).name for argument in arguments)
    print(f"{name}: {took:.2f} s, status {done.returncode}", flush=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stdout}{done.stderr}")
    time.sleep(then_s)
    return {"command": name, "began": began, "took_s": round(took, 2)}


def changes(home: Path) -> list[Change]:
    """Return every plan that was in force, by its file in the history, which is written just before."""
    found = []
    for path in sorted((home / "history").glob("plan-*.json")):
        plans = traffic_plan.load(path)
        plan = plans.models[0]
        routed = (plan.stable, plan.canary)
        versions = frozenset(release.version for release in routed if release is not None)
        found.append(Change(path.stat().st_mtime, plan.revision, versions))
    return found


def outside_the_plan(answers: list[Answer], plans: list[Change]) -> list[Answer]:
    """Return the answers of versions to which no plan in force gave traffic during the request."""
    ends = [change.since + FOLLOWED_WITHIN_S for change in plans[1:]] + [float("inf")]
    return [
        answer
        for answer in answers
        if answer.status == 200
        and not any(
            change.since <= answer.answered and answer.due <= end and answer.version in change.versions
            for change, end in zip(plans, ends, strict=True)
        )
    ]


def failures(answers: list[Answer]) -> list[dict[str, float]]:
    """Return the first failed requests: seconds after the first request, seconds until the failure, and the status."""
    began = answers[0].due
    bad = [answer for answer in answers if answer.status != 200]
    return [
        {"at_s": round(a.due - began, 2), "took_s": round(a.answered - a.due, 3), "status": a.status} for a in bad[:20]
    ]


def canary_sides(answers: list[Answer], plans: list[Change]) -> dict[str, Any]:
    """Return the number of the canary's callers, the range that its share allows, and callers that changed sides."""
    from scipy.stats import binom  # noqa: PLC0415 — see above

    index = next(index for index, change in enumerate(plans) if len(change.versions) == 2)
    since, until = plans[index].since + FOLLOWED_WITHIN_S, plans[index + 1].since
    sides = defaultdict(set)
    counts: Counter[str] = Counter()
    for answer in answers:
        if answer.status == 200 and since <= answer.due and answer.answered <= until:
            sides[answer.caller].add(answer.version)
            counts[answer.version] += 1
    low, high = binom.interval(0.999, len(sides), SHARE / 100)
    return {
        "share_per_cent": SHARE,
        "callers_asked": len(sides),
        "callers": sum(SECOND in versions for versions in sides.values()),
        "callers_expected": [int(low), int(high)],
        "changed_sides": sum(len(versions) > 1 for versions in sides.values()),
        "answers": dict(counts),
    }


def rollback_times(answers: list[Answer], plans: list[Change], steps: list[dict[str, Any]]) -> dict[str, float]:
    """Return seconds: the whole command; from its start, and from the plan's change, to the new one's last request."""
    step = next(step for step in steps if step["command"] == "rollback")
    plan = next(change for change in plans if change.since >= step["began"])
    after = next(change.since for change in plans if change.since > plan.since)
    last = max(answer.due for answer in answers if answer.version == SECOND and answer.due < after)
    return {
        "command_s": step["took_s"],
        "last_request_after_command_s": round(last - step["began"], 2),
        "last_request_after_plan_s": round(last - plan.since, 2),
    }


def latencies(answers: list[Answer]) -> dict[str, float]:
    """Return a quantile of the milliseconds from due to answered."""
    times = sorted(answer.answered - answer.due for answer in answers if answer.status == 200)
    return {name: round(1000 * times[int(len(times) * share)], 1) for name, share in (("p50", 0.5), ("p99", 0.99))} | {
        "max": round(1000 * times[-1], 1)
    }


def management_calls(home: Path) -> dict[str, int]:
    """Return the calls of TorchServe's management API, without the status checks."""
    lines = (home / "logs" / "management.log").read_text(encoding="utf-8").splitlines()
    return dict(Counter(call["method"] for call in map(json.loads, lines) if call["method"] != "GET"))


def environment_facts() -> dict[str, str]:
    """Return hardware and versions."""
    from training.tracking.store import environment  # noqa: PLC0415 — see above

    return {name: value for name, value in environment().items() if name != "threads"} | {
        "load_average": str(os.getloadavg()[0])
    }


if __name__ == "__main__":
    main()
