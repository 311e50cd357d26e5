"""Decide what a run does: the kind of the input, the output's columns, and the shards that are not written yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from contracts import wire
from control.bulk import output as output_folder
from control.bulk.output import Done, Form
from control.bulk.scorer import Job
from control.bulk.source import PARQUET_SUFFIX, Shard, Source, list_files, list_pieces, make_shards, parquet_schema
from control.bulk.storage import public_name
from control.errors import ArchiveError, InputUnusable, OutputUnusable
from control.images.files import OVERLAY_SUFFIX, SUFFIXES
from gateway.inference.questions import share_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyarrow import Schema

    from contracts.model import Contract
    from control.archive import Archive

BATCH = 32
"""Images in one forward pass; more are no faster (docs/explanation/engines.md)."""


@dataclass(frozen=True)
class Asked:
    """The options of a run.

    Attributes:
        place: the input, a path or URL.
        output: the output's folder, a path or URL.
        column: the Parquet column with the images; None for the only one that can have them.
        keep: further columns of the Parquet files, copied to the output.
        top_k: classes for each image.
        evidence: evidence for each image.
        file_rows: images in each file of the output.
    """

    place: str
    output: str
    column: str | None = None
    keep: tuple[str, ...] = ()
    top_k: int = 1
    evidence: bool = False
    file_rows: int = 1024


@dataclass(frozen=True)
class Plan:
    """The shards that are to be answered, of `images` images in all; an earlier run has answered `done` images."""

    job: Job
    shards: tuple[Shard, ...]
    images: int
    done: int


def make_plan(asked: Asked, archive: Archive) -> Plan:
    """Return what is left to do, and say in the output's folder what answers.

    Raises:
        ArchiveError: an earlier release has packed the archive.
        InputUnusable: there are no images, or they cannot be read.
        OutputUnusable: the folder has something else, or cannot be written.
    """
    contract = archive.contract
    if wire.WIRES[contract.schema] < 2:
        raise ArchiveError(archive.path, "an earlier release has packed it: pack it again with gradserve package")
    try:
        source, files, kept = _choose_source(asked)
    except (OSError, ValueError, ImportError) as error:
        raise InputUnusable(public_name(asked.place), str(error)) from error
    model = {"model": contract.name, "version": contract.version, "sha256": archive.sha256}
    form = Form(asked.top_k, asked.evidence, bool(source.column), kept, json.dumps(model))
    about = model | {"input": public_name(asked.place), "column": source.column, "keep": list(source.keep)}
    done = _prepare_output(asked.output, about | {"top_k": asked.top_k, "evidence": asked.evidence})
    try:
        pieces = [piece for piece in list_pieces(source, files) if piece not in done]
    except (OSError, ValueError) as error:
        raise InputUnusable(public_name(asked.place), str(error)) from error
    shards = tuple(make_shards(pieces, asked.file_rows))
    job = Job(source, asked.output, form, _batch_length(contract, evidence=asked.evidence))
    return Plan(job, shards, sum(shard.rows for shard in shards), len(done))


def _choose_source(asked: Asked) -> tuple[Source, Sequence[str], tuple[Any, ...]]:
    """Return the input, its files, and the fields of the columns that are kept.

    Raises:
        OSError, ValueError, ImportError: the input cannot be used.
    """
    found = list_files(Source(asked.place))
    images = [name for name in found if _suffix(name) in SUFFIXES and not name.endswith(OVERLAY_SUFFIX)]
    tables = [name for name in found if _suffix(name) == PARQUET_SUFFIX and not name.rpartition("/")[2].startswith("_")]
    if images and tables:
        raise ValueError("it has both images and Parquet files: name a folder that has one kind")
    if tables:
        schema = parquet_schema(Source(asked.place), tables[0])
        source = Source(asked.place, asked.column or _find_column(schema), asked.keep)
        _check_columns(source, schema, tables[0])
        return source, tables, tuple(schema.field(name) for name in source.keep)
    if not images:
        raise ValueError(f"it has no images ({', '.join(sorted(SUFFIXES))}) and no Parquet files")
    if asked.column or asked.keep:
        raise ValueError("--column and --keep are about Parquet files, and it has image files: remove them")
    return Source(asked.place), images, ()


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"


def _find_column(schema: Schema) -> str:
    found = [field.name for field in schema if _holds_images(field)]
    if len(found) != 1:
        names = ", ".join(found or schema.names)
        raise ValueError(f"{len(found) or 'no'} columns of bytes may be the images: name one by --column ({names})")
    return str(found[0])


def _check_columns(source: Source, schema: Schema, file: str) -> None:
    missing = [name for name in (source.column, *source.keep) if name not in schema.names]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]!r}; it has {', '.join(schema.names)}")
    if not _holds_images(schema.field(source.column)):
        raise ValueError(f"the column {source.column!r} is {schema.field(source.column).type}, and images are bytes")
    own = Form(2, evidence=True, from_parquet=True, kept=(), about="").schema().names
    taken = [name for name in source.keep if name in own]
    if taken:
        raise ValueError(f"the column {taken[0]!r} cannot be kept: the output has one of its own")


def _holds_images(field: Any) -> bool:  # noqa: ANN401 - pyarrow has no types
    from pyarrow import types  # noqa: PLC0415 - optional

    kind = field.type
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:  # noqa: ANN401 - pyarrow has no types
    from pyarrow import types  # noqa: PLC0415 - optional

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _prepare_output(place: str, about: dict[str, Any]) -> Done:
    """Return the images that the output has already, in a folder that says what answers.

    Raises:
        OutputUnusable: another model, input or option wrote it, or it cannot be read or written.
    """
    try:
        output = output_folder.open_output(place)
        before = output_folder.read_about(output)
        if before is None:
            output_folder.write_about(output, about)
        else:
            _check_same(before, about)
        output_folder.remove_partial(output)
        return Done(output)
    except (OSError, ValueError, ImportError) as error:
        raise OutputUnusable(public_name(place), str(error)) from error


def _check_same(before: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise if a run that wrote `before` about itself answered otherwise.

    Raises:
        ValueError: it did, and how.
    """
    if before == about:
        return
    remedy = "name another folder, or remove this one"
    if before.get("sha256") != about["sha256"]:
        theirs, ours = (
            f"{one.get('model')} {one.get('version')} (archive {str(one.get('sha256'))[:12]}…)"
            for one in (before, about)
        )
        raise ValueError(f"it has the answers of {theirs}, not of {ours}: {remedy}")
    name = next(name for name, value in about.items() if before.get(name) != value)
    raise ValueError(f"it was written with {name} {before.get(name)!r}, not {about[name]!r}: {remedy}")


def _batch_length(contract: Contract, *, evidence: bool) -> int:
    """Return the images in one forward pass: `BATCH`, or as many explanations as fit into the handler's answer."""
    if not evidence:
        return BATCH
    share = share_of(wire.ImageOptions(explain=True), contract)
    return max(1, min(BATCH, wire.MAX_ANSWER_BYTES // share.answer_bytes))
