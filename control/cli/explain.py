"""The `explain` command: evidence and overlays for image files, from a gateway or an archive."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Literal

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
    from control.images.sources import Question, Source

Show = Literal["auto", "never", "kitty", "iterm2", "sixel", "blocks"]


def register(app: typer.Typer) -> None:
    """Add the command to the `gradserve` command."""
    app.command(rich_help_panel="Images")(explain)


def explain(  # noqa: PLR0917 - every option is an argument
    files: Files,
    target: Annotated[
        str | None, typer.Option(help="Class to explain.", show_default="the predicted one", metavar="CLASS")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method of the heatmap; GET /models lists them.", show_default="the model's"),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(min=0.5, max=0.999, help="Also name the classes that hold the right one with this probability."),
    ] = None,
    test: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--test", help="Also try the heatmap: keep only the hot region, and blur it away.")
    ] = False,
    alpha: Annotated[float | None, typer.Option(min=0, max=1, help="Opacity of the heatmap.")] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Pixels of the overlay's longer side.", show_default="the image's"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the overlays.", show_default="beside each image"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace overlays that exist.")] = False,  # noqa: FBT002 - a flag
    show: Annotated[
        Show,
        typer.Option(help="Show overlays in the terminal. auto asks the environment, and shows none in a pipe."),
    ] = "auto",
    url: Url = None,
    archive: ArchiveFile = None,
    key_file: KeyFile = None,
    version: Version = None,
    model: Model = None,
    *,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show which part of each image supports a class: write the heatmap over the image to IMAGE-heatmap.png.

    A file that exists is never replaced without --force. A running gateway answers; without one, the archive is loaded
    into this process. A file that fails is named with the reason on stderr, and the rest goes on.

    Example: gradserve explain tests/samples/cat/0.png --target dog --test --output heatmaps

    Exit codes: 0 every image was explained, 1 some image was not, or none could be (the reason is printed).
    """
    from control.images.choice import choose_images, choose_source
    from control.images.results import choose_printer, print_all
    from control.images.sources import Question

    asked = [*(["classes"] if coverage else []), *(["verdict"] if test else [])]
    table = ["class", "confidence", "target", "familiar", *asked, "overlay"]
    numbers = ["method", "kept", "removed", "model", "version"]
    images = choose_images(files)
    printer = choose_printer(table, numbers, as_json=as_json, as_csv=as_csv)
    question = Question(target, method, coverage, test, alpha, size)
    with closing(choose_source(url, archive, key_file, version, model)) as source:
        results = explain_all(source, images, question, output, force=force)
        failures = print_all(results, printer, len(images), partial(_show, show=show))
    raise typer.Exit(1 if failures else 0)


def explain_all(
    source: Source, images: Sequence[ImageFile], question: Question, folder: Path | None, *, force: bool
) -> Iterator[Result]:
    """Yield the result of each image, in order, after its overlay was written beside it or below `folder`.

    Raises:
        ControlError: the source can answer no image.
    """
    from control.images.results import Result, failed, unreadable
    from gradserve import Failed

    written: dict[Path, ImageFile] = {}
    for image in images:
        path = image.overlay_path(folder)
        if path in written:
            yield Result(image, failed("overlay_taken", f"{path} is the overlay of {written[path].name}: rename one"))
            continue
        if path.exists() and not force:
            yield Result(image, failed("overlay_exists", f"{path} exists: --force replaces it, --output DIR moves it"))
            continue
        try:
            found = source.explain(image.read(), question)
            if isinstance(found, Failed):
                yield Result(image, found)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb" if force else "xb") as file:
                file.write(found.overlay)
        except OSError as error:
            yield Result(image, unreadable(error))
            continue
        written[path] = image
        yield Result(image, found.evidence, path, found.overlay)


def _show(result: Result, show: Show) -> None:
    """Show the overlay in the terminal, if it can; a missing Pillow is no reason to fail."""
    from control.images.inline import draw, find_protocol

    if not result.png or show == "never":
        return
    protocol: str | None = show
    if show == "auto":
        protocol = find_protocol(os.environ, is_terminal=sys.stdout.isatty())
    if protocol is None:
        return
    try:
        typer.echo(f"{result.image.name}: {result.answer['class']}")
        typer.echo(draw(result.png, protocol), nl=False, color=True)  # also into a pipe, if --show names it
    except ImportError:
        typer.echo("showing it needs Pillow: pip install pillow", err=True)
