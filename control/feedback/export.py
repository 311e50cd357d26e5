"""Export the feedback store: as a folder of images that `train --data imagefolder:` takes, or as Parquet."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from control.errors import ControlError, FeedbackUnusable, MissingExtra
from gateway.feedback.store import FeedbackStore, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gateway.feedback.store import Feedback, LoggedCall

# Source: the formats' signatures, as the gateway reads them (gateway/inference/image_header.py).
_SUFFIXES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"GIF8", "gif"))
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Summary:
    """The content of a feedback store.

    Attributes:
        calls: answered calls.
        images: those with their image.
        feedback: those with feedback.
        confirmed: those whose feedback is the class that was answered.
        corrected: for each pair of answered and right class that differ, the number of calls, most first.
    """

    calls: int
    images: int
    feedback: int
    confirmed: int
    corrected: tuple[tuple[str, str, int], ...]


def open_store(path: Path) -> FeedbackStore:
    """Return the store at `path`.

    Raises:
        FeedbackUnusable: there is none.
    """
    if not path.is_file():
        raise FeedbackUnusable(path, "there is no such file")
    return FeedbackStore(path)


@contextmanager
def reading(store: FeedbackStore) -> Iterator[None]:
    """Translate the store's errors in the block.

    Raises:
        FeedbackUnusable: the store cannot be read.
    """
    try:
        yield
    except StoreError as error:
        raise FeedbackUnusable(store.path, str(error)) from error


def summarise(store: FeedbackStore) -> Summary:
    """Return the numbers of calls, images and corrections.

    Raises:
        FeedbackUnusable: the store cannot be read.
    """
    with reading(store):
        kept = [call.image is not None for call in store.calls()]
        pairs = Counter((call.class_name, said.class_name) for call, said in store.labelled())
    wrong = sorted(((*pair, count) for pair, count in pairs.items() if pair[0] != pair[1]), key=lambda row: -row[2])
    confirmed = sum(count for (answered, right), count in pairs.items() if answered == right)
    return Summary(len(kept), sum(kept), pairs.total(), confirmed, tuple(wrong))


def export_folder(store: FeedbackStore, folder: Path, *, corrected_only: bool = False) -> Counter[str]:
    """Write the images with feedback to FOLDER/CLASS/REQUEST_ID.SUFFIX and return the number of each class.

    Calls whose image was not sampled are left out; with `corrected_only`, so are those that the feedback confirms.

    Raises:
        FeedbackUnusable: the store cannot be read.
        ControlError: the folder is not empty, or cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        # An image whose feedback changed since the last export would lie in two classes.
        raise ControlError(f"{folder} is not an empty folder: name another one, or remove it")
    written: Counter[str] = Counter()
    try:
        for call, said in store.labelled():
            if call.image is None or (corrected_only and call.class_name == said.class_name):
                continue
            path = folder / _folder_name(said.class_name) / f"{_file_name(call.request_id)}.{_suffix(call.image)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(call.image)
            written[said.class_name] += 1
    except StoreError as error:
        raise FeedbackUnusable(store.path, str(error)) from error
    except OSError as error:
        raise ControlError(f"{folder} cannot be written to: {error}") from error
    return written


def export_parquet(store: FeedbackStore, path: Path) -> int:
    """Write every call with its image and feedback to one Parquet file, and return their number.

    Raises:
        FeedbackUnusable: the store cannot be read.
        MissingExtra: pyarrow is not installed.
        ControlError: the file exists.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - optional
        import pyarrow.parquet as pq  # noqa: PLC0415 - optional
    except ImportError as error:
        raise MissingExtra("pyarrow", "a Parquet file", "feedback") from error
    if path.exists():
        raise ControlError(f"{path} exists: name another file, or remove it")
    text, time = pa.string(), pa.timestamp("ms", "UTC")
    columns = {"request_id": text, "at": time, "model": text, "version": text, "class": text}
    columns |= {"confidence": pa.float64(), "familiar": pa.bool_(), "headers": text, "image": pa.binary()}
    columns |= {"feedback_at": time, "feedback_class": text, "feedback_note": text, "feedback_caller": text}
    schema = pa.schema(list(columns.items()))
    count = 0
    try:
        feedback = {call.request_id: said for call, said in store.labelled()}
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []
            for call in store.calls():
                rows.append(_row(call, feedback.get(call.request_id)))
                if len(rows) == _ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    count, rows = count + len(rows), []
            writer.write_table(pa.Table.from_pylist(rows, schema))
    except StoreError as error:
        raise FeedbackUnusable(store.path, str(error)) from error
    return count + len(rows)


def _row(call: LoggedCall, said: Feedback | None) -> dict[str, Any]:
    row = asdict(call) | {"headers": json.dumps(dict(call.headers)), "at": round(call.at * 1000)}
    row["class"] = row.pop("class_name")
    if said is not None:
        row |= {"feedback_at": round(said.at * 1000), "feedback_class": said.class_name}
        row |= {"feedback_note": said.note, "feedback_caller": said.caller}
    return row


def _suffix(image: bytes) -> str:
    return next((suffix for signature, suffix in _SUFFIXES if image.startswith(signature)), "img")


def _folder_name(class_name: str) -> str:
    """Return the class's folder, whose name a training takes for the class.

    Raises:
        ControlError: no folder can have this name.
    """
    if class_name.startswith(".") or "/" in class_name or "\0" in class_name:
        raise ControlError(
            f"the class {class_name!r} cannot be the name of a folder: export as Parquet (--parquet FILE)"
        )
    return class_name


def _file_name(request_id: str) -> str:
    # A caller may have chosen the id; a name that begins with a dot would be hidden.
    return request_id.replace(":", "_").lstrip(".") or "image"
