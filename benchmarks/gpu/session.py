"""Train on a borrowed GPU machine that has no network, takes small transfers and is lent for minutes.

CIFAR-10 travels in parts of lossless WebP files, and a result comes back in pieces; a training is stopped when its time
is over and continued by the same command. docs/how-to/gpus.md says what to type in which order.

    python benchmarks/gpu/session.py pack PARTS                     # at home: PARTS/1, PARTS/2, …
    python benchmarks/gpu/session.py unpack PARTS/1 --cache CACHE   # on the machine: once with each part
    python benchmarks/gpu/session.py estimate --config RECIPE --speeds SPEEDS
    python benchmarks/gpu/session.py train RUN --config RECIPE --cache CACHE --seconds 480 --output PIECES
    python benchmarks/gpu/session.py split RUN --output PIECES      # the pieces alone, of any run
    python benchmarks/gpu/session.py join PIECES RUN                # at home
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.data.sources import CIFAR10, SPLITS, Published, load_cifar10
from training.recipe import CHECKPOINT, Recipe, recipe_from_dict
from training.run_folder import FILES

if TYPE_CHECKING:
    from training.data.sources import Split

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("GRADSERVE_DATA", Path.home() / ".cache" / "gradserve"))
MIB = 2**20
TILES = (20, 25)  # images of a file: one below the other, side by side
TRAINING_FILES = 5  # of CIFAR-10's binary version
TRAINING_IMAGES = 45_000  # of CIFAR-10 that a release learns
# The training of cifar10 0.9.0 on an H100: 290 epochs in 490 s, of which 465 s trained. At 32 pixels its median epoch
# had 31,189 images/s, and epochs without validation and checkpoints beside them 38,985.
VALIDATION_S, SLOWER = 0.09, 1.25


def main() -> None:
    """Run one of the commands."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(required=True, dest="command")
    command = commands.add_parser("pack")
    command.add_argument("parts", type=Path)
    command.add_argument("--part-mib", type=float, default=50)
    command.add_argument("--cache", type=Path, default=CACHE)
    command = commands.add_parser("unpack")
    command.add_argument("part", type=Path, nargs="+")
    command.add_argument("--cache", type=Path, default=CACHE)
    command = commands.add_parser("estimate")
    command.add_argument("--config", type=Path, required=True)
    command.add_argument("--speeds", type=Path, required=True)
    command = commands.add_parser("train")
    command.add_argument("run", type=Path)
    command.add_argument("--config", type=Path, required=True)
    command.add_argument("--seconds", type=float, required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--piece-mib", type=float, default=15)
    command.add_argument("--cache", type=Path, default=CACHE)
    command = commands.add_parser("split")
    command.add_argument("run", type=Path)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--piece-mib", type=float, default=15)
    command = commands.add_parser("join")
    command.add_argument("pieces", type=Path)
    command.add_argument("run", type=Path)
    chosen, further = options.parse_known_args()
    if further and chosen.command != "train":
        options.error(f"unknown: {' '.join(further)}")
    match chosen.command:
        case "pack":
            for part in pack(load_cifar10(chosen.cache), chosen.parts, round(chosen.part_mib * MIB)):
                print(part, f"{sum(file.stat().st_size for file in part.iterdir()) / MIB:.1f} MiB")
        case "unpack":
            print(unpack(chosen.part, chosen.cache))
        case "estimate":
            recipe = recipe_from_dict(tomllib.loads(chosen.config.read_text(encoding="utf-8")))
            speeds = json.loads(chosen.speeds.read_text(encoding="utf-8"))["images_per_s"]
            for mode, seconds in estimate(recipe, speeds).items():
                print(f"{mode}: {seconds:.0f} s")
        case "train":
            stopped = train(chosen.run, chosen.config, chosen.cache, chosen.seconds, further)
            print(*pieces(chosen.run, chosen.output, round(chosen.piece_mib * MIB)), sep="\n")
            sys.exit("stopped: the same command continues" if stopped else 0)
        case "split":
            print(*pieces(chosen.run, chosen.output, round(chosen.piece_mib * MIB)), sep="\n")
        case "join":
            print(join(chosen.pieces, chosen.run))


def pack(splits: dict[str, Split], folder: Path, part_bytes: int) -> list[Path]:
    """Write the images as lossless WebP files into numbered folders, each below `part_bytes`, and return these.

    Each folder has a `manifest.json`: the number of folders, and the SHA-256 of its files.
    """
    count = TILES[0] * TILES[1]
    files: list[tuple[str, bytes]] = []
    for name in SPLITS:
        files.append((f"{name}-labels.bin", splits[name].labels.tobytes()))
        images = splits[name].images
        for number, start in enumerate(range(0, len(images), count)):
            files.append((f"{name}-{number:03d}.webp", _mosaic(images[start : start + count])))
    parts: list[list[tuple[str, bytes]]] = [[]]
    for file in files:
        if parts[-1] and sum(len(content) for _, content in [*parts[-1], file]) > part_bytes - MIB // 16:
            parts.append([])
        parts[-1].append(file)
    for number, part in enumerate(parts, 1):
        place = folder / str(number)
        place.mkdir(parents=True)
        for name, content in part:
            (place / name).write_bytes(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in part}
        manifest = {"part": number, "parts": len(parts), "sha256": digests}
        (place / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return [folder / str(number) for number in range(1, len(parts) + 1)]


def unpack(parts: list[Path], cache: Path, published: Published = CIFAR10) -> str:
    """Keep `parts` in `cache`; once all are there, make the data set of them. Return a sentence about what is there.

    Raises:
        SystemExit: a file was damaged on its way.
        CorruptData: the images are not the published ones.
    """
    kept = cache / "parts"
    for part in parts:
        manifest = json.loads((part / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["sha256"].items():
            if hashlib.sha256((part / name).read_bytes()).hexdigest() != digest:
                sys.exit(f"{part / name} was damaged on its way: transfer the part again")
        shutil.copytree(part, kept / str(manifest["part"]), dirs_exist_ok=True)
    here, wanted = {int(path.name) for path in kept.iterdir()}, set(range(1, manifest["parts"] + 1))
    if missing := wanted - here:
        return f"{len(here)} of {len(wanted)} parts are there: unpack {', '.join(map(str, sorted(missing)))} too"
    binary = cache / "binary"
    binary.mkdir(exist_ok=True)
    files = {path.name: path for path in kept.rglob("*") if path.is_file()}
    for name in SPLITS:
        mosaics = [files[found] for found in sorted(files) if found.startswith(name) and found.endswith(".webp")]
        labels = np.frombuffer(files[f"{name}-labels.bin"].read_bytes(), np.uint8)
        _write_binary(name, np.concatenate([_images(path) for path in mosaics])[: len(labels)], labels, binary)
    splits = load_cifar10(cache, binary, published)
    shutil.rmtree(binary)
    return f"{', '.join(f'{len(split.labels)} {name} images' for name, split in splits.items())}: as published"


def estimate(recipe: Recipe, speeds: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return the seconds that a training by `recipe` takes, by the way in which steps run.

    Args:
        recipe: of CIFAR-10, from scratch.
        speeds: images/s by way, batch size, and image size with `, sharpness-aware` where it is so: `speed.py`'s.
    """
    times = {}
    for mode, by_batch in speeds.items():
        found = by_batch.get(str(recipe.batch_size), {})
        seconds = 0.0
        for phase in recipe.phases():
            for epoch in range(phase.epochs):
                is_sharp = recipe.sam_radius and epoch / phase.epochs >= recipe.sam_from
                kind = f"{phase.image_size(epoch) or 32}{', sharpness-aware' if is_sharp else ''}"
                seconds += SLOWER * TRAINING_IMAGES / found.get(kind, float("nan")) + VALIDATION_S
        times[mode] = seconds
    return times


def train(run: Path, recipe: Path, cache: Path, seconds: float, further: list[str]) -> bool:
    """Train or continue for at most `seconds`, and return True if the training was stopped before its end.

    Raises:
        SystemExit: the training failed.
    """
    begins = ["--config", str(recipe), "--output", str(run), *further]
    what = ["--resume", str(run)] if (run / CHECKPOINT).exists() else begins
    command = [sys.executable, "-m", "control.cli.main", "train", *what, "--cache", str(cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(command, check=False, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:  # killed: the checkpoint is at most half a minute old
        return True
    if done.returncode:
        sys.exit(f"the training failed ({done.returncode})")
    return False


def pieces(run: Path, output: Path, piece_bytes: int) -> list[Path]:
    """Write the run's files, without the checkpoint, as pieces of at most `piece_bytes`; return the pieces."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in FILES:
            if (run / name).is_file():
                archive.add(run / name, name)
    content = packed.getvalue()
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob(f"{run.name}.tar.*"):
        old.unlink()
    written = []
    for number, start in enumerate(range(0, len(content), piece_bytes)):
        written.append(output / f"{run.name}.tar.{number:02d}")
        written[-1].write_bytes(content[start : start + piece_bytes])
    (output / f"{run.name}.tar.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n", encoding="utf-8")
    return written


def join(output: Path, run: Path) -> str:
    """Unpack the pieces of `run.name` in the folder `output` into `run`, and return a sentence about it.

    Raises:
        SystemExit: a piece is missing or damaged.
    """
    content = b"".join(path.read_bytes() for path in sorted(output.glob(f"{run.name}.tar.[0-9][0-9]")))
    if hashlib.sha256(content).hexdigest() != (output / f"{run.name}.tar.sha256").read_text(encoding="utf-8").strip():
        sys.exit(f"a piece of {run.name} in {output} is missing or damaged: fetch them again")
    run.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            if member.isfile():  # all lie side by side: no name can lead elsewhere
                (run / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    history = json.loads((run / "history.json").read_text(encoding="utf-8"))
    best = max(epoch["validation_accuracy"] for epoch in history)
    return f"{run}: {len(history)} epochs, best held-out accuracy {best:.2%}"


def _mosaic(images: np.ndarray) -> bytes:
    """Return up to 500 images (N, H, W, 3) uint8, joined, as a lossless WebP file; places left over are black."""
    rows, columns = TILES
    _, height, width, _ = images.shape
    tiles = np.zeros((rows * columns, height, width, 3), np.uint8)
    tiles[: len(images)] = images
    whole = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "WEBP", lossless=True, quality=100, method=4)
    return file.getvalue()


def _images(path: Path) -> np.ndarray:
    rows, columns = TILES
    with Image.open(path) as file:
        whole = np.asarray(file.convert("RGB"))
    height, width = whole.shape[0] // rows, whole.shape[1] // columns
    return whole.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)


def _write_binary(name: str, images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write a part of the data set as the files of CIFAR-10's binary version."""
    rows = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(labels), -1)], axis=1)
    if name == "test":
        (folder / "test_batch.bin").write_bytes(rows.tobytes())
        return
    for number, part in enumerate(np.array_split(rows, TRAINING_FILES), 1):
        (folder / f"data_batch_{number}.bin").write_bytes(part.tobytes())


if __name__ == "__main__":
    main()
