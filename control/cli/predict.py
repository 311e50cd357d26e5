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
    Model,
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
    model: Model = None,
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
    from control.images.choice import choose_images, choose_source
    from control.images.results import choose_printer, print_all

    ranks = [name for rank in range(2, top_k + 1) for name in (f"class_{rank}", f"confidence_{rank}")]
    table = ["class", "confidence", *ranks, "familiar"]
    images = choose_images(files)
    printer = choose_printer(table, ["model", "version"], as_json=as_json, as_csv=as_csv)
    with closing(choose_source(url, archive, key_file, version, model)) as source:
        failures = print_all(predict_all(source, images, top_k), printer, len(images))
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
