"""Measure `gradserve score` on CIFAR-10's 10,000 test images against a bare loop over the same engine.

The bare loop is one process: it reads the images, asks the archive's handler in batches of 32, and writes nothing.
`score` runs with one and with two actors, by the command that people use. Its start (Ray, actors, model) is reported
apart from its throughput, which is that between the first and the last file of the output. The variants take turns
within a round; figures are medians with the range over the rounds. With `--nodes`, `score` also runs on two Ray nodes
in network namespaces, of which one is killed when a quarter is written (needs root and iproute2): the report has the
images, their differences from the bare loop's answers, and the time.

    python benchmarks/score.py [MODEL_FOLDER] [--rounds 3] [--nodes]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image
from pyarrow import dataset, parquet

from benchmarks.gateway import environment_facts, model_of
from benchmarks.serving.servers import ROOT
from control.bulk.plan import BATCH
from control.bulk.scorer import ArchiveModel
from control.stack.stack import pack
from training.data.sources import load_cifar10

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULT = Path(__file__).parent / "results" / "score.json"
CACHE = Path.home() / ".cache" / "gradserve"
FILE_ROWS = 500
SAME = 0.002
HEAD, WORKER, PORT = "10.199.78.1", "10.199.78.2", 6398
BIN = Path(sys.executable).parent
Answers = dict[str, tuple[str, float]]


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--nodes", action="store_true", help="also two nodes, one of them killed")
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        archive = pack(chosen.folder, folder / "store")
        images, table = write_images(folder)
        report: dict[str, Any] = {"model": model_of(chosen.folder), "images": 10_000, "rounds": chosen.rounds}
        rounds = [one_round(archive, images, table, folder / f"round-{number}") for number in range(chosen.rounds)]
        expected = rounds[0].pop("answers")
        report["images_per_s"] = {
            name: spread([one[name] for one in rounds]) for name in rounds[0] if name != "answers"
        }
        report["two_nodes"] = kill_one_of_two(archive, images, folder / "nodes", expected) if chosen.nodes else None
    report |= {"load_average": os.getloadavg()[0], "environment": environment_facts()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["images_per_s"], indent=2), report["two_nodes"], f"written to {chosen.output}", sep="\n")


def write_images(folder: Path) -> tuple[Path, Path]:
    """Write the test images as PNG files, and as one Parquet file with row groups of `FILE_ROWS`."""
    images = folder / "images"
    images.mkdir()
    contents = []
    for number, pixels in enumerate(load_cifar10(CACHE)["test"].images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        contents.append(file.getvalue())
        (images / f"{number:05}.png").write_bytes(contents[-1])
    table = folder / "images.parquet"
    parquet.write_table(pa.table({"image": contents}), table, row_group_size=FILE_ROWS)
    return images, table


def one_round(archive: Path, images: Path, table: Path, folder: Path) -> dict[str, Any]:
    """Return the images per second of every variant, and the bare loop's answers."""
    with get_context("spawn").Pool(1) as pool:
        answers, bare = pool.apply(bare_loop, (archive, images))
    found: dict[str, Any] = {"answers": answers, "bare loop, 1 process, PNG": bare}
    for name, place, workers, more in (
        ("score, 1 actor, PNG", images, 1, ()),
        ("score, 2 actors, PNG", images, 2, ()),
        ("score, 2 actors, Parquet", table, 2, ()),
        ("score, 2 actors, PNG, --evidence", images, 2, ("--evidence",)),
    ):
        output = folder / str(len(found))
        started = time.time()
        subprocess.run(command(archive, place, output, "--workers", str(workers), *more), check=True)
        times = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
        # The first file of each actor is part of its start.
        found[name] = FILE_ROWS * (len(times) - workers) / (times[-1] - times[workers - 1])
        found[f"{name}: seconds to the first file"] = times[0] - started
        shutil.rmtree(output)
    return found


def bare_loop(archive: Path, images: Path) -> tuple[Answers, float]:
    """Return every image's class and confidence, and the images per second without the model's start."""
    for name in [name for name in sys.modules if name.split(".")[0] in {"contracts", "handlers"}]:
        del sys.modules[name]  # the archive brings its own
    model = ArchiveModel(archive.read_bytes())
    answers: Answers = {}
    started = time.perf_counter()
    for names in batches(sorted(path.name for path in images.iterdir()), BATCH):
        contents = [(images / name).read_bytes() for name in names]
        for name, entry in zip(names, model.answer(contents, top_k=1, explain=False), strict=True):
            answers[name] = (entry["class"], entry["confidence"])
    speed = len(answers) / (time.perf_counter() - started)
    return answers, speed


def batches(names: list[str], length: int) -> Iterator[list[str]]:
    """Yield the names in groups of `length`."""
    for start in range(0, len(names), length):
        yield names[start : start + length]


def command(archive: Path, place: Path, output: Path, *more: str) -> list[str]:
    """Return the command that scores `place`."""
    options = ["--archive", str(archive), "--file-rows", str(FILE_ROWS), *more]
    return [str(BIN / "gradserve"), "score", str(place), str(output), *options]


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the range."""
    return {
        "median": round(statistics.median(values), 1),
        "least": round(min(values), 1),
        "most": round(max(values), 1),
    }


def kill_one_of_two(archive: Path, images: Path, output: Path, expected: Answers) -> dict[str, Any]:
    """Score on two nodes of one core each, kill one when a quarter is written, and compare the answers."""
    with two_nodes() as (namespace, worker):
        started = time.monotonic()
        scoring = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command(archive, images, output, "--address", f"{HEAD}:{PORT}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        while scoring.poll() is None and len(list(output.glob("*.parquet"))) < 10_000 / FILE_ROWS / 4:
            time.sleep(0.05)
        written = len(list(output.glob("*.parquet")))
        kill(worker)
        said = scoring.communicate()[0]
        seconds = time.monotonic() - started
    rows = dataset.dataset(output).to_table(["file", "class", "confidence"]).to_pylist()
    found = {row["file"]: (row["class"], row["confidence"]) for row in rows}
    pairs = [(found[name], answer) for name, answer in expected.items() if name in found]
    return {
        "exit_code": scoring.returncode,
        "said": re.sub(r" by .*", "", said.strip()),
        "images_written_at_the_kill": written * FILE_ROWS,
        "rows": len(rows),
        "images": len(found),
        "other_class": sum(ours[0] != theirs[0] for ours, theirs in pairs),
        "bit_equal": sum(ours == theirs for ours, theirs in pairs),
        "largest_difference": max(abs(ours[1] - theirs[1]) for ours, theirs in pairs),
        "wanted": {"images": 10_000, "other_class": 0, "largest_difference": SAME},
        "seconds": round(seconds, 1),
    }


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run two Ray nodes of one core in two network namespaces; yield the first one's name and the second's process."""
    names = [f"gradserve-bench-{os.getpid()}-{end}" for end in "ab"]
    links = [f"gb{os.getpid()}{end}" for end in "ab"]
    start = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--object-store-memory=200000000"]
    start.append("--disable-usage-stats")
    with contextlib.ExitStack() as made:
        for name in names:
            run("ip", "netns", "add", name)
            made.callback(run, "ip", "netns", "delete", name)
        run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, (HEAD, WORKER), strict=True):
            run("ip", "link", "set", link, "netns", name)
            for change in (f"addr add {address}/24 dev {link}", f"link set {link} up", "link set lo up"):
                run("ip", "-n", name, *change.split())
        for name, options in (
            (names[0], ["--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false"]),
            (names[1], [f"--node-ip-address={WORKER}", f"--address={HEAD}:{PORT}"]),
        ):
            node = subprocess.Popen(
                ["ip", "netns", "exec", name, *start, *options], stdout=subprocess.DEVNULL, start_new_session=True
            )
            made.callback(kill, node)
            time.sleep(30)
        yield names[0], node


def run(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a node with all its processes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
