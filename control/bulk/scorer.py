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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from control.bulk.output import failed_entry, open_output, write_table
from control.bulk.source import read_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from control.bulk.output import Entry, Form
    from control.bulk.source import Batch, Shard, Source

_NAME = "bulk"
_TRIES_ALONE = 2
"""An image that ends the process twice, when it is the only one that the process answers, is not tried again."""
_MOST_IN_VAIN = 32
"""Images that end the process before any other is answered: then the model is at fault, not the images."""


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


class ProcessEnded(Exception):
    """The process that was to answer images has ended."""


class Model(Protocol):
    """A model that answers images."""

    def answer(self, images: Sequence[bytes], *, top_k: int, explain: bool) -> list[Entry]:
        """Return one entry of the wire per image, in order."""


class ArchiveModel:
    """The model of an archive, loaded by the archive's own handler. A process can hold one."""

    def __init__(self, archive: bytes, within: str | None = None) -> None:
        """Unpack into a folder `within` another one, load, verify and warm the model.

        Raises:
            RuntimeError: the model cannot run here, and why.
        """
        # Kept, because an engine may map its files.
        self._folder = tempfile.TemporaryDirectory(prefix="gradserve-score-", dir=within)
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


class GuardedModel:
    """A model in a process of its own. An image that ends this process gets an error instead of an answer.

    `start` starts a process and returns its model, whose `answer` raises `ProcessEnded`.
    """

    def __init__(self, start: Callable[[], Model]) -> None:
        self._start = start
        self._model: Model | None = None
        self._has_answered = False
        self._in_vain = 0

    def answer(self, images: Sequence[bytes], *, top_k: int, explain: bool) -> list[Entry]:
        """Return one entry of the wire per image, in order. Images that end the process together are halved.

        Raises:
            RuntimeError: the process ends at every image.
        """
        for _ in range(_TRIES_ALONE if len(images) == 1 else 1):
            entries = self._try(images, top_k=top_k, explain=explain)
            if entries is not None:
                return entries
        if len(images) == 1:
            return [self._failed()]
        half = len(images) // 2
        return [
            entry
            for part in (images[:half], images[half:])
            for entry in self.answer(part, top_k=top_k, explain=explain)
        ]

    def _try(self, images: Sequence[bytes], *, top_k: int, explain: bool) -> list[Entry] | None:
        """Return the entries, None if the process ended."""
        if self._model is None:
            self._model = self._start()
        try:
            entries = self._model.answer(images, top_k=top_k, explain=explain)
        except ProcessEnded:
            self._model = None
            return None
        self._has_answered = True
        return entries

    def _failed(self) -> Entry:
        self._in_vain += 1
        if self._in_vain >= _MOST_IN_VAIN and not self._has_answered:
            raise RuntimeError(f"the process with the model ended at each of {self._in_vain} images, one by one")
        return failed_entry("process_ended", f"the process ended at this image, {_TRIES_ALONE} times of {_TRIES_ALONE}")


class Scorer:
    """Answers shards and writes their files."""

    def __init__(self, model: Model, job: Job) -> None:
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
