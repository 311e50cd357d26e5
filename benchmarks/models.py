"""Three models in one stack: memory and start time, and moving each while all three answer.

The stack starts with the released model; two copies of it with other names are added. Clients ask all three models all
the time and never retry. Then each model in turn gets a second version as a canary, which is promoted and rolled back.
The report has the memory and the seconds of each step, failed calls by model, and the versions that answered for each
model while one was moved.

    python benchmarks/models.py [MODEL_FOLDER] [--pause 3]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

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
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.gateway import environment_facts, images, model_of, post
from benchmarks.serving.load import Address, open_loop
from benchmarks.serving.servers import ROOT, Stack, stack

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULT = Path(__file__).parent / "results" / "models.json"
OTHERS = ("hands", "feet")
SECOND = "99.0.0"
RATE = 10  # requests a second to each model
LONGEST_S = 3600.0
FOLLOWED_S = 1.0
_VERSION = re.compile(rb'"version":"([^"]+)"')


@dataclass
class Calls:
    """The answers of one model: when they came, their status (0: connection lost), and their version."""

    name: str
    answers: list[tuple[float, int, str]] = field(default_factory=list)

    def note(self, _number: int, _due: float, _answered: float, status: int, answer: bytes) -> None:
        """Add an answer."""
        found = _VERSION.search(answer)
        self.answers.append((time.monotonic(), status, found[1].decode() if found else ""))

    def failed(self) -> dict[str, int]:
        """Return the number of answers of each status but 200."""
        return dict(Counter(str(status) for _, status, _ in self.answers if status != 200))

    def versions(self, since: float, until: float) -> set[str]:
        """Return the versions of the good answers in a span of time."""
        return {version for at, status, version in self.answers if since <= at <= until and status == 200}


def main() -> None:
    """Measure, print and write the JSON; exit with 1 if a caller noticed an error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--pause", type=float, default=3.0, help="seconds of load after each command")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    report: dict[str, Any] = {"model": model_of(chosen.folder), "rate_per_s_and_model": RATE}
    with tempfile.TemporaryDirectory() as scratch:
        report |= measure(chosen.folder, Path(scratch), chosen.pause)
    report |= {"load_average": os.getloadavg()[0], "environment": environment_facts()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2), f"written to {chosen.output}", sep="\n")
    sys.exit(0 if is_independent(report) else 1)


def is_independent(report: dict[str, Any]) -> bool:
    """Return True if no call failed, and no model but the moved one ever answered with another version."""
    moves = [step for step in report["steps"] if "versions_seen" in step]
    others = [
        versions
        for step in moves
        for name, versions in step["versions_seen"].items()
        if not step["step"].endswith(f" {name}")
    ]
    return not report["failed"] and all(len(versions) == 1 for versions in others)


def measure(folder: Path, scratch: Path, pause_s: float) -> dict[str, Any]:
    """Run the whole sequence and return the report."""
    first = str(model_of(folder)["name"])
    second = {name: pack(folder, scratch, name, SECOND) for name in (first, *OTHERS)}
    others = {name: pack(folder, scratch, name, "1.0.0") for name in OTHERS}
    began = time.monotonic()
    with contextlib.ExitStack() as running:
        site = running.enter_context(stack(folder))
        steps = [{"step": "start with one model", "took_s": round(time.monotonic() - began, 1)}]
        models = [running.enter_context(asked(site, first))]
        steps[-1]["memory_mb"] = after(site, pause_s)
        for name, archive in others.items():
            steps.append({"step": f"add {name}", "took_s": gradserve(site, "deploy", str(archive), "--model", name)})
            time.sleep(FOLLOWED_S)
            models.append(running.enter_context(asked(site, name)))
            steps[-1]["memory_mb"] = after(site, pause_s)
        steps += [move(site, models, name, archive, pause_s) for name, archive in second.items()]
    failed = {calls.name: calls.failed() for calls in models if calls.failed()}
    return {"steps": steps, "calls": {calls.name: len(calls.answers) for calls in models}, "failed": failed}


def move(site: Stack, models: list[Calls], name: str, archive: Path, pause_s: float) -> dict[str, Any]:
    """Make a second version of a model its canary, promote it and roll it back; return what was seen meanwhile."""
    since = time.monotonic()
    took = {}
    for command, *more in (("deploy", str(archive), "--canary", "50"), ("promote",), ("rollback",)):
        took[command] = gradserve(site, command, *more, "--model", name)
        time.sleep(pause_s)
    until = time.monotonic()
    seen = {calls.name: sorted(calls.versions(since, until)) for calls in models}
    return {"step": f"move {name}", "took_s": took, "memory_mb": round(site.memory_mb()), "versions_seen": seen}


def pack(folder: Path, scratch: Path, name: str, version: str) -> Path:
    """Return the archive of the model under another name and version."""
    from training.package.export import package_directory  # noqa: PLC0415 - the generator's process needs no torch

    copy = Path(shutil.copytree(folder, scratch / f"{name}-{version}"))
    contract = json.loads((copy / "contract.json").read_text(encoding="utf-8"))
    (copy / "contract.json").write_text(json.dumps(contract | {"name": name, "version": version}), encoding="utf-8")
    return package_directory(copy, scratch / f"packed-{name}-{version}")


@contextlib.contextmanager
def asked(site: Stack, name: str) -> Iterator[Calls]:
    """Ask the model during the block."""
    calls, stop = Calls(name), threading.Event()
    address = Address(
        site.gateway, [post(f"/predict?model={name}", image, "image/png", site.key) for image in images()]
    )
    generator = threading.Thread(
        target=open_loop, args=(address, RATE, LONGEST_S), kwargs={"each": calls.note, "stop": stop}
    )
    generator.start()
    try:
        yield calls
    finally:
        stop.set()
        generator.join()


def after(site: Stack, pause_s: float) -> int:
    """Return the memory of the whole stack after a pause."""
    time.sleep(pause_s)
    return round(site.memory_mb())


def gradserve(site: Stack, *arguments: str) -> float:
    """Run a command beside the stack and return its seconds; a failure ends the benchmark with the command's output."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "control.cli.main", *arguments],
        cwd=site.home, env=site.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    name = " ".join(Path(argument).name for argument in arguments)
    print(f"{name}: {time.monotonic() - began:.1f} s, status {done.returncode}", flush=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stdout}{done.stderr}")
    return round(time.monotonic() - began, 1)


if __name__ == "__main__":
    main()
