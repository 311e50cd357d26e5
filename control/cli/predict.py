"""The `predict` command: the classes of image files, from a gateway or an archive."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from control.images.choice import (  # noqa: TC001 - typer reads the annotations
    ArchiveFile,
    AsCsv,
    AsJson,
    Files,
    KeyFile,
    Url,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from control.images.files import ImageFile
    from control.images.results import Result
    from control.images.sources import Source

_AT_ONCE = 32


def register(app: typer.Typer) -> None:
    """Add the command to the `gradserve` command."""
    app.command(rich_help_panel="Images")(predict)


def predict(  # noqa: PLR0917 - every option is an argument
    files: Files,
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes for each image, best first.")] = 1,
    url: Url = None,
    archive: ArchiveFile = None,
    key_file: KeyFile = None,
    version: Version = None,
    *,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Name the class of each image.

    A running gateway answers; without one, the archive is loaded into this process (a few seconds). A file that fails
    is named with the reason on stderr, and the rest goes on. Folders are searched with their sub-folders.

    Example: gradserve predict tests/samples/cat --top-k 2

    Exit codes: 0 every image was answered, 1 some image was not, or none could be (the reason is printed).
    """
    from control.images.choice import choose_source
    from control.images.files import find_images
    from control.images.results import Csv, JsonLines, Table, progress, refuse_two_forms

    refuse_two_forms(as_json=as_json, as_csv=as_csv)
    images = find_images(files)
    if not images:
        raise typer.BadParameter("no images there: name a file, or a folder with .png, .jpg, .webp, .bmp or .gif files")
    ranks = [name for rank in range(2, top_k + 1) for name in (f"class_{rank}", f"confidence_{rank}")]
    names = ["class", "confidence", *ranks, "familiar"]
    printer = JsonLines() if as_json else Csv([*names, "model", "version"]) if as_csv else Table(names)
    failures = 0
    is_table = not (as_json or as_csv)
    with (
        closing(choose_source(url, archive, key_file, version)) as source,
        progress(len(images), is_shown=is_table) as count,
    ):
        for result in predict_all(source, images, top_k):
            if result.error is None:
                printer.add(result)
            else:
                failures += 1
                with count.aside():
                    printer.add(result)
            count()
    printer.close()
    raise typer.Exit(1 if failures else 0)


def predict_all(source: Source, images: Sequence[ImageFile], top_k: int) -> Iterator[Result]:
    """Yield the result of each image, in order.

    Raises:
        ControlError: the source can answer no image.
    """
    from control.images.results import Result, unreadable
    from gradserve import Failed

    for start in range(0, len(images), _AT_ONCE):
        group = images[start : start + _AT_ONCE]
        contents: list[bytes | Failed] = []
        for image in group:
            try:
                contents.append(image.read())
            except OSError as error:
                contents.append(unreadable(error))
        answers = iter(source.predict([content for content in contents if isinstance(content, bytes)], top_k))
        for image, content in zip(group, contents, strict=True):
            yield Result(image, content if isinstance(content, Failed) else next(answers))
