"""Answer shards by an archive's own code, in a process of its own, as a TorchServe worker runs it.

Runs on the cluster's machines, which need no gradserve: no import of the rest of it, and `contracts` and `handlers` are
the archive's.
"""

from __future__ import annotations

import importlib
import io
import sys
import tempfile
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

from control.bulk.output import failed_entry, open_output, write_table
from control.bulk.source import read_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from control.bulk.output import Entry, Form
    from control.bulk.source import Batch, Shard, Source

_NAME = "bulk"


class Job(NamedTuple):
    """The work on every shard: where from, where to, and how.

    Attributes:
        source: the input.
        output: the path or URL of the output's folder.
        form: the output's columns.
        batch: images in one forward pass.
    """

    source: Source
    output: str
    form: Form
    batch: int


class Counts(NamedTuple):
    """A shard's images, and those of them that have an error instead of an answer."""

    images: int
    errors: int


class ArchiveModel:
    """The model of an archive, loaded by the archive's own handler. A process can hold one."""

    def __init__(self, archive: bytes) -> None:
        """Unpack, load, verify and warm the model.

        Raises:
            RuntimeError: the model cannot run here, and why.
        """
        # Kept, because an engine may map its files.
        self._folder = tempfile.TemporaryDirectory(prefix="gradserve-score-")
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            members.extractall(self._folder.name)  # `inspect_archive` refuses members that would leave the folder
        sys.path.insert(0, self._folder.name)
        self._wire = importlib.import_module("contracts.wire")
        self._handler = importlib.import_module("image_handler").ImageHandler()
        self._handler.initialize(_Context(system_properties={"model_dir": self._folder.name, "gpu_id": None}))

    def answer(self, images: Sequence[bytes], *, top_k: int, explain: bool) -> list[Entry]:
        """Return one entry of the wire per image, in order; those of one forward pass."""
        options = self._wire.Options(top_k=top_k)
        if explain:
            asked = (self._wire.ImageOptions(explain=True),) * len(images)
            options = options._replace(images=asked, format="json")
        request = self._wire.dump_request(images, options)
        context = _Context({"content-type": request.content_type, self._wire.OPTIONS_HEADER: request.options})
        (answer,) = self._handler.handle([{"body": request.body}], context)
        entries: list[Entry] = self._wire.parse_results(answer, len(images))
        return entries


class Scorer:
    """Answers shards and writes their files."""

    def __init__(self, model: ArchiveModel, job: Job) -> None:
        self._model = model
        self._job = job
        self._output = open_output(job.output)

    def __call__(self, shard: Shard) -> Counts:
        """Answer all images of the shard and write them to one file.

        Raises:
            OSError, ValueError: a Parquet file cannot be read, or the output cannot be written.
        """
        form, tables, errors = self._job.form, [], 0
        for batch in read_batches(self._job.source, shard, self._job.batch):
            entries = self._answer(batch)
            errors += sum("error" in entry for entry in entries)
            tables.append(form.table(batch, entries))
        write_table(self._output, shard.name, tables)
        return Counts(shard.rows, errors)

    def _answer(self, batch: Batch) -> list[Entry]:
        images = [content for content in batch.contents if isinstance(content, bytes)]
        form = self._job.form
        answers = iter(self._model.answer(images, top_k=form.top_k, explain=form.evidence) if images else ())
        return [
            next(answers) if isinstance(content, bytes) else failed_entry("file", content) for content in batch.contents
        ]


class _Context:
    """The part of TorchServe's context that a handler uses."""

    model_name = _NAME
    metrics = None

    def __init__(self, headers: dict[str, str] | None = None, system_properties: dict[str, Any] | None = None) -> None:
        self._headers = headers or {}
        self.system_properties = system_properties or {}

    def get_request_header(self, _idx: int, key: str) -> str | None:
        """Return the header of the one row."""
        return self._headers.get(key)

    def set_response_content_type(self, _idx: int, _value: str) -> None:
        """Ignore the type: the answer is JSON."""
