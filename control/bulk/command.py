"""The `score` command: a whole folder or table of images, answered by an archive on one machine or a Ray cluster."""
# ruff: noqa: PLC0415 (each command imports what it needs, see control/cli/main.py)

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Annotated

import typer

from control.images.choice import ArchiveFile  # noqa: TC001 - typer reads the annotation

if TYPE_CHECKING:
    from pathlib import Path

    from control.archive import Archive


def register(app: typer.Typer) -> None:
    """Add the command to the `gradserve` command."""
    app.command(rich_help_panel="Images")(score)


def score(  # noqa: PLR0917 - every option is an argument
    place: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder with images, searched with its sub-folders, or Parquet files; a path, or a URL such as "
            "s3://bucket/folder.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for the Parquet files; a path or a URL.")],
    archive: ArchiveFile = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster that this machine is part of, as HOST:PORT or `auto`.",
            metavar="ADDRESS",
            show_default="Ray on this machine, for this run",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes with a model, one core each.", show_default="all cores")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Parquet column with the images.", metavar="NAME", show_default="the only one of bytes"),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Parquet column to copy to the output; more than once for more.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes for each image, best first.")] = 1,
    file_rows: Annotated[int, typer.Option(min=1, help="Images in each file of the output.")] = 1024,
    *,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Add familiarity, similar training images and the heatmap.")
    ] = False,
) -> None:
    """Answer a whole folder or table of images, and write the answers as Parquet.

    The archive's own code answers, as in a worker of the service, in one process for each core. An image that cannot
    be read gets a row with its error. A run that was stopped goes on where it was when it is started again. Needs
    Ray: in the clone, pip install -e '.[bulk]'.

    Example: gradserve score photos answers --evidence

    Exit codes: 0 every image has a row, 1 not (the reason is printed).
    """
    from control.bulk.on_ray import check_installed, score_shards
    from control.bulk.plan import Asked, make_plan
    from control.images.choice import default_archive
    from control.images.results import progress

    if evidence and top_k > 1:
        raise typer.BadParameter("choose one of --top-k and --evidence: an explanation has one class")
    check_installed()
    inspected, data = _read_archive(archive or default_archive())
    asked = Asked(place, output, column, tuple(keep or ()), top_k, evidence, file_rows)
    plan = make_plan(asked, inspected)
    if plan.done:
        typer.echo(f"{plan.done:,} images are answered already")
    images, errors, started = 0, 0, time.monotonic()
    with progress(plan.images, is_shown=True) as count:
        for counts in (
            score_shards(data, plan.job, plan.shards, address=address, workers=workers) if plan.shards else ()
        ):
            images, errors = images + counts.images, errors + counts.errors
            count(counts.images)
    seconds = time.monotonic() - started
    typer.echo(f"{images:,} images in {seconds:.1f} s by {inspected.contract.name} {inspected.version}: {output}")
    if errors:
        typer.echo(f"{errors:,} of them have an error in place of an answer (column `error`)", err=True)


def _read_archive(path: Path) -> tuple[Archive, bytes]:
    """Return the archive after all checks, and its bytes.

    Raises:
        ArchiveError: it must not be loaded.
    """
    from control.archive import checksum_beside, inspect_archive, load_trusted_keys
    from control.errors import ArchiveError
    from control.settings import trusted_key_files

    inspected = inspect_archive(path, checksum_beside(path), trusted=load_trusted_keys(trusted_key_files()))
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != inspected.sha256:
        raise ArchiveError(path, "was changed while it was read: run the command again")
    return inspected, data
