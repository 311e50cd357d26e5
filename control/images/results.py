"""The results of `predict` and `explain`, printed as a table, as JSON lines or as comma-separated values."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import typer

from control.cli.status import columns, output
from gradserve import Evidence, Failed, Prediction, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from rich.progress import Progress

    from control.images.files import ImageFile

UNFAMILIAR = "[yellow]no[/yellow]"


@dataclass(frozen=True)
class Result:
    """One image with its answer; `overlay` is the file that was written for it, `png` its bytes."""

    image: ImageFile
    answer: Prediction | Evidence | Failed
    overlay: Path | None = None
    png: bytes = field(default=b"", repr=False)

    @property
    def error(self) -> str | None:
        """The reason why there is no answer; None if there is one."""
        return f"{self.answer.code}: {self.answer.detail}" if isinstance(self.answer, Failed) else None

    def dump(self) -> dict[str, Any]:
        """Return the file and the answer, or its error, as JSON-able data."""
        document = dict(self.answer.document)
        if isinstance(self.answer, Failed):
            document = {"error": {"code": self.answer.code, "detail": self.answer.detail}}
        overlay = {"overlay": str(self.overlay)} if self.overlay else {}
        return {"file": self.image.name, **document, **overlay}


def failed(code: str, detail: str) -> Failed:
    """Return the error of an image that was not asked about."""
    return Failed(status=0, code=code, detail=detail, document={})


def unreadable(error: OSError) -> Failed:
    """Return the error of a file that cannot be read or written."""
    if isinstance(error, FileNotFoundError):
        return failed("file", "there is no such file, and as a pattern the name matches none")
    return failed("file", error.strerror or type(error).__name__)


def choose_printer(table: Sequence[str], more: Sequence[str], *, as_json: bool, as_csv: bool) -> Printer:
    """Return what prints the results in the form that is asked for, by default as a table.

    Args:
        table: the names of the table's columns.
        more: further names, which comma-separated values have after these.
        as_json: True for JSON lines.
        as_csv: True for comma-separated values.

    Raises:
        typer.BadParameter: two forms are asked for.
    """
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv")
    if as_json:
        return JsonLines()
    return Csv([*table, *more]) if as_csv else Table(table)


def print_all(
    results: Iterable[Result], printer: Printer, total: int, show: Callable[[Result], None] | None = None
) -> int:
    """Print the results of `total` images as they come, and return how many images failed.

    `show` is called for each result, if they are printed for a person.
    """
    failures = 0
    is_table = isinstance(printer, Table)
    with progress(total, is_shown=is_table) as count:
        for result in results:
            failures += result.error is not None
            if result.error is None and show is None:
                printer.add(result)
            else:
                with count.aside():
                    printer.add(result)
                    if is_table and show is not None:
                        show(result)
            count()
    printer.close()
    return failures


class Counter:
    """Counts images; with a bar, on the bar."""

    def __init__(self, bar: Progress | None = None) -> None:
        self._bar = bar

    def __call__(self, images: int = 1) -> None:
        """Count one more image, or as many as `images` says."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], images)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while the block prints: rich moves no text that click prints, and nothing into a pipe."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()


@contextmanager
def progress(total: int, *, is_shown: bool) -> Iterator[Counter]:
    """Yield a counter of images; a bar on the standard error shows its count if that is a terminal."""
    if not (is_shown and total > 1 and sys.stderr.isatty()):
        yield Counter()
        return
    from rich.console import Console  # noqa: PLC0415 - not for `--help`
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn  # noqa: PLC0415 - as above

    parts = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        bar.add_task("", total=total)
        yield Counter(bar)


class Printer(Protocol):
    """Prints results in one form."""

    def add(self, result: Result) -> None:
        """Print the result, now or at the end."""

    def close(self) -> None:
        """Print what is left."""


class JsonLines:
    """Prints one JSON object per image and line, at once."""

    def add(self, result: Result) -> None:
        """Print the result."""
        print(json.dumps(result.dump(), ensure_ascii=False), flush=True)  # noqa: T201 - the command's output

    def close(self) -> None:
        """Print no more."""


class Csv:
    """Prints one line of comma-separated values per image, at once, under a header."""

    def __init__(self, names: Sequence[str]) -> None:
        self._writer = csv.DictWriter(sys.stdout, ["file", *names, "error"], extrasaction="ignore", lineterminator="\n")
        self._writer.writeheader()

    def add(self, result: Result) -> None:
        """Print the result."""
        self._writer.writerow(row(result))
        sys.stdout.flush()

    def close(self) -> None:
        """Print no more."""


class Table:
    """Prints a table at the end, because its columns are as wide as their longest cell; empty columns are left out."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._rows: list[dict[str, Any]] = []

    def add(self, result: Result) -> None:
        """Keep the result for the table; print an error at once."""
        if result.error is None:
            self._rows.append(row(result))
        else:
            typer.echo(f"{result.image.name}: {result.error}", err=True)

    def close(self) -> None:
        """Print the table."""
        if not self._rows:
            return
        names = [name for name in self._names if any(found.get(name) is not None for found in self._rows)]
        table = columns("file", *names)
        for found in self._rows:
            table.add_row(*(_cell(name, found.get(name)) for name in ("file", *names)))
        output().print(table)


def row(result: Result) -> dict[str, Any]:
    """Return the result as named cells: texts, numbers, or None for what is not known."""
    cells: dict[str, Any] = {"file": result.image.name, "overlay": result.overlay, "error": result.error}
    answer = result.answer
    if isinstance(answer, Failed):
        return cells
    cells |= {"class": answer.class_name, "confidence": answer.confidence, "familiar": _known(answer.familiar)}
    if answer.model is not None:
        cells |= {"model": answer.model.name, "version": answer.model.version}
    if isinstance(answer, Prediction):
        for rank, entry in enumerate(answer.top[1:], 2):
            cells |= {f"class_{rank}": entry.class_name, f"confidence_{rank}": entry.confidence}
        return cells
    cells |= {"target": answer.target.class_name, "method": answer.method}
    if answer.answer_set is not None and not isinstance(answer.answer_set, Unavailable):
        cells["classes"] = " ".join(answer.answer_set.class_names)
    if answer.test is not None and not isinstance(answer.test, Unavailable):
        cells |= {"kept": answer.test.kept, "removed": answer.test.removed, "verdict": answer.test.verdict}
    return cells


def _known(value: bool | Unavailable | None) -> bool | None:  # noqa: FBT001 - a value to print
    return value if isinstance(value, bool) else None


def _cell(name: str, value: object) -> str:
    if name == "familiar":
        return {True: "yes", False: UNFAMILIAR}.get(value, "–") if isinstance(value, bool) else "–"
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1%}"
    from rich.markup import escape  # noqa: PLC0415 - not for `--help`

    return escape(str(value))
