"""The output: a folder of Parquet files, one for each shard, and a file that says which model answered.

A file appears with all its rows or not at all, so that what a killed run has written is kept.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from control.bulk.source import PARQUET_SUFFIX
from control.bulk.storage import PARTIAL_SUFFIX, Storage, open_storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyarrow import Schema, Table

    from control.bulk.source import Batch, Piece

    Entry = dict[str, Any]

ABOUT_FILE = "_gradserve.json"
"""Readers of Parquet folders skip names that begin with an underscore."""


class Form(NamedTuple):
    """The output's columns.

    Attributes:
        top_k: classes in the column `top`; there is none for 1.
        evidence: there are columns of evidence.
        from_parquet: there is a column `row`.
        kept: the columns that the input brings, a schema of pyarrow.
        about: the model, for the files' metadata, as JSON.
    """

    top_k: int
    evidence: bool
    from_parquet: bool
    kept: Any
    about: str

    def schema(self) -> Schema:
        """Return the columns with their types."""
        import pyarrow as pa  # noqa: PLC0415 - optional

        text, number = pa.string(), pa.float64()  # doubles, as the service's JSON has them
        named = pa.struct([("class", text), ("confidence", number)])
        columns = {"file": text}
        if self.from_parquet:
            columns["row"] = pa.int64()
        columns |= {"class": text, "confidence": number}
        if self.top_k > 1:
            columns["top"] = pa.list_(named)
        columns["familiar"] = pa.bool_()
        if self.evidence:
            similar = pa.struct([("id", pa.int32()), ("class", text), ("similarity", number)])
            heatmap = pa.struct([("height", pa.int32()), ("width", pa.int32()), ("values", pa.binary())])
            columns |= {"familiarity": number, "similar": pa.list_(similar), "method": text, "strength": number}
            columns["heatmap"] = heatmap
        columns["error"] = pa.struct([("code", text), ("detail", text)])
        fields = [*(pa.field(name, kind) for name, kind in columns.items()), *self.kept]
        return pa.schema(fields, metadata={"gradserve": self.about})

    def table(self, batch: Batch, entries: Sequence[Entry]) -> Table:
        """Return the rows of a batch; `entries` are the handler's, one for each image."""
        import pyarrow as pa  # noqa: PLC0415 - optional

        rows = [
            {"file": file, "row": row, **_cells(entry)}
            for file, row, entry in zip(batch.files, batch.rows, entries, strict=True)
        ]
        schema = self.schema()
        own = pa.schema([field for field in schema if field.name not in batch.kept])
        table = pa.Table.from_pylist(rows, own)
        for name, values in batch.kept.items():
            table = table.append_column(schema.field(name), pa.chunked_array([values]))
        return table.replace_schema_metadata(schema.metadata)


def failed_entry(code: str, detail: str) -> Entry:
    """Return the entry of an image that the model was not asked about."""
    return {"error": {"code": code, "detail": detail}}


def _cells(entry: Entry) -> dict[str, Any]:
    """Return the cells of one image; a part of the evidence that the model cannot give is null."""
    error = entry.get("error")
    if error is not None:
        return {"error": {"code": error.get("code"), "detail": error.get("detail")}}
    cells = {name: None if _is_unavailable(value) else value for name, value in entry.items()}
    heatmap = cells.get("heatmap")
    if heatmap is not None:
        cells["heatmap"] = {**heatmap, "values": base64.b64decode(heatmap["values"])}
    return cells


def _is_unavailable(value: object) -> bool:
    return isinstance(value, dict) and "unavailable" in value


def write_table(output: Storage, name: str, tables: Sequence[Table]) -> None:
    """Write a shard's rows to the file `name`.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa  # noqa: PLC0415 - optional
    from pyarrow import parquet  # noqa: PLC0415 - optional

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.concat_tables(tables), sink, compression="zstd")
    output.write(name, sink.getvalue())


def read_about(output: Storage) -> dict[str, Any] | None:
    """Return what an earlier run wrote about itself; None in a new or empty folder.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it has files of something else.
    """
    names = [name for name in output.names() if not name.endswith(PARTIAL_SUFFIX)]
    if ABOUT_FILE in names:
        about: dict[str, Any] = json.loads(output.read(ABOUT_FILE))
        return about
    if names:
        raise ValueError(f"it has other files ({names[0]}): name a new folder")
    return None


def write_about(output: Storage, about: dict[str, Any]) -> None:
    """Create the folder and say in it what answers.

    Raises:
        OSError: it cannot be written.
    """
    output.files.create_dir(output.root, recursive=True)
    output.write(ABOUT_FILE, json.dumps(about, indent=2).encode() + b"\n")


def remove_partial(output: Storage) -> None:
    """Remove the files that a killed run has left half written.

    Raises:
        OSError: one cannot be removed.
    """
    for name in output.names():
        if name.endswith(PARTIAL_SUFFIX):
            output.files.delete_file(output.path(name))


class Done:
    """The images that the output has rows of."""

    def __init__(self, output: Storage) -> None:
        """Read them.

        Raises:
            OSError, ValueError: a file cannot be read.
        """
        from pyarrow import parquet  # noqa: PLC0415 - optional

        self._places: set[str | tuple[str, int]] = set()
        for name in output.names():
            if not name.endswith(PARQUET_SUFFIX):
                continue
            path = output.path(name)
            with parquet.ParquetFile(path, filesystem=output.files) as file:
                columns = [column for column in ("file", "row") if column in file.schema_arrow.names]
                read = [column.to_pylist() for column in file.read(columns).columns]
            self._places.update(zip(*read, strict=True) if len(read) > 1 else read[0])

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, piece: Piece) -> bool:
        place = piece.file if piece.row is None else (piece.file, piece.row)
        return place in self._places


def open_output(place: str) -> Storage:
    """Return the output's folder.

    Raises:
        OSError, ValueError, ImportError: see `open_storage`; the path is a file.
    """
    output = open_storage(place)
    if output.is_file():
        raise ValueError("it is a file: name a folder")
    return output
