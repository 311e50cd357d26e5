"""Measure `gradserve score` on CIFAR-10's 10,000 test images against a bare loop over the same engine.

The bare loop is one process: it reads the images, asks the archive's handler in batches of 32, and writes nothing.
`score` runs on two Ray nodes of one core each, in network namespaces, with one and with two actors. Its throughput is
that after the first file of each actor; the time until then is reported apart. The variants take turns within a round;
figures are medians with the range over the rounds. At the end one node is killed when a quarter is written: the report
has the images, their differences from the bare loop's answers, and the time. Needs root and iproute2.

    python benchmarks/score.py [MODEL_FOLDER] [--rounds 3]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import dataset, parquet

from benchmarks.gateway import environment_facts, model_of
from benchmarks.serving.figures import spread
from benchmarks.serving.ray_nodes import ADDRESS, BIN, Nodes, two_nodes
from benchmarks.serving.servers import ROOT
from control.bulk.plan import BATCH
from control.bulk.scorer import ArchiveModel
from control.stack.stack import pack
from training.data.images import encode_png
from training.data.sources import load_cifar10

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULT = Path(__file__).parent / "results" / "score.json"
CACHE = Path.home() / ".cache" / "gradserve"
FILE_ROWS = 512  # whole batches, so that they are those of the bare loop
SAME = 0.002
GIVE_UP_S = 400
Answers = dict[str, tuple[str, float]]


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, default=ROOT / "model_store" / "released")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch, two_nodes() as nodes:
        folder = Path(scratch)
        archive = pack(chosen.folder, folder / "store")
        images, table = write_images(folder)
        rounds, expected = [], {}
        for number in range(chosen.rounds):
            with get_context("spawn").Pool(1) as pool:
                expected, bare = pool.apply(bare_loop, (archive, images))
            places = {"PNG": images, "Parquet": table}
            scored = one_round(nodes, archive, places, folder / f"round-{number}", len(expected))
            rounds.append({"bare loop, 1 process, PNG": bare} | scored)
        report: dict[str, Any] = {"model": model_of(chosen.folder), "images": len(expected), "rounds": chosen.rounds}
        report["images_per_s"] = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
        report["two_nodes"] = kill_one_of_two(nodes, command(archive, images, folder / "nodes"), expected)
    report |= {"load_average": os.getloadavg()[0], "environment": environment_facts()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["images_per_s"], indent=2), report["two_nodes"], f"written to {chosen.output}", sep="\n")


def write_images(folder: Path) -> tuple[Path, Path]:
    """Write the test images as PNG files, and as one Parquet file with row groups of `FILE_ROWS`."""
    images = folder / "images"
    images.mkdir()
    contents = []
    for number, pixels in enumerate(load_cifar10(CACHE)["test"].images):
        contents.append(encode_png(pixels))
        (images / f"{number:05}.png").write_bytes(contents[-1])
    table = folder / "images.parquet"
    parquet.write_table(pa.table({"image": contents}), table, row_group_size=FILE_ROWS)
    return images, table


def one_round(nodes: Nodes, archive: Path, places: dict[str, Path], folder: Path, count: int) -> dict[str, float]:
    """Return the images per second of each way to score, and the seconds to its first file."""
    found = {}
    for form, workers, more in (("PNG", 1, ()), ("PNG", 2, ()), ("Parquet", 2, ()), ("PNG", 2, ("--evidence",))):
        output = folder / str(len(found))
        name = " ".join(("score,", f"{workers}", "actor," if workers == 1 else "actors,", form, *more))
        started = time.time()
        options = ("--workers", str(workers), *more)
        subprocess.run([*nodes.inside, *command(archive, places[form], output, *options)], check=True)
        times = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
        # The first file of each actor is part of its start.
        found[name] = (count - FILE_ROWS * workers) / (times[-1] - times[workers - 1])
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
    options = ["--archive", str(archive), "--file-rows", str(FILE_ROWS), "--address", ADDRESS, *more]
    return [str(BIN / "gradserve"), "score", str(place), str(output), *options]


def kill_one_of_two(nodes: Nodes, scoring: list[str], expected: Answers) -> dict[str, Any]:
    """Score, kill the second node when a quarter is written, and compare the answers with the expected ones."""
    output = Path(scoring[3])
    started = time.monotonic()
    process = subprocess.Popen([*nodes.inside, *scoring])
    while process.poll() is None and len(list(output.glob("*.parquet"))) < len(expected) / FILE_ROWS / 4:
        time.sleep(0.05)
    written = len(list(output.glob("*.parquet")))
    nodes.kill_second()
    code = process.wait(timeout=GIVE_UP_S)
    seconds = time.monotonic() - started
    rows = dataset.dataset(output).to_table(["file", "class", "confidence"]).to_pylist()
    found = {row["file"]: (row["class"], row["confidence"]) for row in rows}
    pairs = [(found[name], answer) for name, answer in expected.items() if name in found]
    return {
        "exit_code": code,
        "images_written_at_the_kill": written * FILE_ROWS,
        "rows": len(rows),
        "images": len(found),
        "other_class": sum(ours[0] != theirs[0] for ours, theirs in pairs),
        "bit_equal": sum(ours == theirs for ours, theirs in pairs),
        "largest_difference": max(abs(ours[1] - theirs[1]) for ours, theirs in pairs),
        "wanted": {"images": len(expected), "other_class": 0, "largest_difference": SAME},
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
