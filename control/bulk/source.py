"""The input: image files, or a column of Parquet files. Listed in one order, cut into shards, read batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from control.bulk.storage import Storage, open_storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pyarrow import RecordBatch, Schema

PARQUET_SUFFIX = ".parquet"
_READERS = 8
"""Threads that read ahead: enough to hide a store's latency, few enough to cost a local disk's reader nothing."""


class Source(NamedTuple):
    """The input.

    Attributes:
        place: the path or URL of a folder, or of one file.
        column: the Parquet column with the images' bytes; empty for image files.
        keep: further columns, which are copied to the output.
    """

    place: str
    column: str = ""
    keep: tuple[str, ...] = ()


class Piece(NamedTuple):
    """One image file, or one row group of a Parquet file: the smallest part of the input that a shard takes.

    Attributes:
        file: its path below the input.
        rows: its images.
        row: number of its first row in the file; None for an image file.
        group: number of the row group; None for an image file.
    """

    file: str
    rows: int = 1
    row: int | None = None
    group: int | None = None


class Shard(NamedTuple):
    """Pieces that are answered together and written to one file, `name`."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """The images."""
        return sum(piece.rows for piece in self.pieces)

    def dump(self) -> str:
        """Return the shard as JSON."""
        return json.dumps([self.name, self.pieces])


class Batch(NamedTuple):
    """Images that are answered by one forward pass.

    Attributes:
        files: the file of each image.
        rows: its row in the file; None for an image file.
        contents: its bytes, or the sentence that says why they cannot be read.
        kept: the columns of `Source.keep`.
    """

    files: Sequence[str]
    rows: Sequence[int | None]
    contents: Sequence[bytes | str]
    kept: dict[str, Any]


def parse_shard(text: str) -> Shard:
    """Return the shard that `Shard.dump` wrote."""
    name, pieces = json.loads(text)
    return Shard(name, tuple(Piece(*piece) for piece in pieces))


def open_input(source: Source) -> Storage:
    """Return the folder that the pieces' files are in.

    Raises:
        OSError, ValueError, ImportError: see `open_storage`.
    """
    storage = open_storage(source.place)
    return storage.parent() if storage.is_file() else storage


def list_files(source: Source) -> Sequence[str]:
    """Return the files below the input, without hidden ones; the one file if the input is one.

    Raises:
        OSError, ValueError, ImportError: the input cannot be read.
    """
    storage = open_storage(source.place)
    if storage.is_file():
        return [storage.root.rpartition("/")[2]]
    return [name for name in storage.names() if not any(part.startswith(".") for part in name.split("/"))]


def list_pieces(source: Source, files: Sequence[str]) -> Iterator[Piece]:
    """Yield the pieces of the files, in order.

    Raises:
        OSError, ValueError: a Parquet file cannot be read.
    """
    if not source.column:
        yield from map(Piece, files)
        return
    storage = open_input(source)
    with ThreadPoolExecutor(_READERS) as pool:
        for file, groups in zip(files, pool.map(lambda name: _group_rows(storage, name), files), strict=True):
            row = 0
            for group, rows in enumerate(groups):
                yield Piece(file, rows, row, group)
                row += rows


def parquet_schema(source: Source, file: str) -> Schema:
    """Return the columns of a Parquet file.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    from pyarrow import parquet  # noqa: PLC0415 - optional

    storage = open_input(source)
    return parquet.read_schema(storage.path(file), filesystem=storage.files)


def make_shards(pieces: Iterable[Piece], rows: int) -> Iterator[Shard]:
    """Yield shards of pieces in order, each of at least `rows` images but the last.

    A shard's name follows from its pieces, so that a shard that is answered twice replaces its own file.
    """
    taken: list[Piece] = []
    count = 0
    for piece in pieces:
        taken.append(piece)
        count += piece.rows
        if count >= rows:
            yield _shard(taken)
            taken, count = [], 0
    if taken:
        yield _shard(taken)


def _shard(pieces: Sequence[Piece]) -> Shard:
    digest = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()
    return Shard(f"part-{digest[:24]}{PARQUET_SUFFIX}", tuple(pieces))


def read_batches(source: Source, shard: Shard, length: int) -> Iterator[Batch]:
    """Yield the shard's images in order, in batches of `length`; a row group's last batch may be shorter.

    An image that cannot be read is in its batch, with the reason.

    Raises:
        OSError, ValueError: a Parquet file cannot be read.
    """
    storage = open_input(source)
    if source.column:
        for piece in shard.pieces:
            yield from _read_group(storage, source, piece, length)
    else:
        yield from _read_files(storage, [piece.file for piece in shard.pieces], length)


def _read_files(storage: Storage, files: Sequence[str], length: int) -> Iterator[Batch]:
    """Yield batches of image files; the next batch is read while one is answered."""
    waiting: deque[tuple[list[str], list[Any]]] = deque()

    def take() -> Batch:
        names, reads = waiting.popleft()
        return Batch(names, [None] * len(names), [read.result() for read in reads], {})

    names = iter(files)
    with ThreadPoolExecutor(_READERS) as pool:
        while group := list(islice(names, length)):
            waiting.append((group, [pool.submit(_read_file, storage, name) for name in group]))
            if len(waiting) > 1:
                yield take()
        while waiting:
            yield take()


def _read_file(storage: Storage, name: str) -> bytes | str:
    try:
        return storage.read(name)
    except OSError as error:
        return str(error)


def _read_group(storage: Storage, source: Source, piece: Piece, length: int) -> Iterator[Batch]:
    from pyarrow import parquet  # noqa: PLC0415 - optional

    row = piece.row or 0
    with parquet.ParquetFile(storage.path(piece.file), filesystem=storage.files, pre_buffer=True) as file:
        columns = [source.column, *source.keep]
        for read in file.iter_batches(length, row_groups=[piece.group], columns=columns, use_threads=False):
            contents = ["the image is null" if data is None else data for data in _image_bytes(read, source.column)]
            rows = list(range(row, row + len(contents)))
            yield Batch([piece.file] * len(rows), rows, contents, {name: read.column(name) for name in source.keep})
            row += len(contents)


def _image_bytes(read: RecordBatch, column: str) -> list[bytes | None]:
    """Return the images of a column of bytes, or of objects with a field `bytes` as Hugging Face's data sets have."""
    from pyarrow import types  # noqa: PLC0415 - optional

    values = read.column(column)
    if types.is_struct(values.type):
        values = values.flatten()[values.type.get_field_index("bytes")]
    found: list[bytes | None] = values.to_pylist()
    return found


def _group_rows(storage: Storage, name: str) -> list[int]:
    from pyarrow import parquet  # noqa: PLC0415 - optional

    metadata = parquet.read_metadata(storage.path(name), filesystem=storage.files)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
