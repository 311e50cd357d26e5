"""The commands for callers' feedback: `gradserve feedback show|export`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from control.settings import home_directory

feedback = typer.Typer(help="Show and export callers' feedback and the calls it is about.", no_args_is_help=True)
StoreFile = Annotated[
    Path | None,
    typer.Option(
        "--store",
        envvar="GATEWAY_FEEDBACK_FILE",
        help="The gateway's feedback store.",
        show_default="feedback.db in GRADSERVE_HOME",
        metavar="PATH",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `gradserve` command."""
    app.add_typer(feedback, name="feedback", rich_help_panel="Feedback")


def store_file(store: Path | None) -> Path:
    """Return the path of the feedback store: `store`, else feedback.db in GRADSERVE_HOME."""
    return store or home_directory() / "feedback.db"


@feedback.command()
def show(
    store: StoreFile = None,
    *,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: calls, images, feedback, confirmed, corrected (answered, right, count).",
        ),
    ] = False,
) -> None:
    """Show how many calls the store holds, and which answers were corrected to what.

    Example: gradserve feedback show --json
    """
    from control.cli.status import columns, output
    from control.feedback.export import open_store, summarise

    found = summarise(open_store(store_file(store)))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(f"{found.calls:,} calls, {found.images:,} with their image, {found.feedback:,} with feedback")
    typer.echo(f"{found.confirmed:,} answers confirmed, {found.feedback - found.confirmed:,} corrected")
    if found.corrected:
        table = columns("answered", "right", "calls")
        for answered, right, count in found.corrected[:20]:
            table.add_row(answered, right, f"{count:,}")
        output().print(table)


@feedback.command()
def export(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder to write: one folder of images for each class.", show_default=False)
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Write all calls, with images and feedback, to this Parquet file.")
    ] = None,
    store: StoreFile = None,
    *,
    corrected: Annotated[bool, typer.Option("--corrected", help="Only images whose answer was corrected.")] = False,
) -> None:
    """Export the images with feedback as a folder that `gradserve train --data imagefolder:FOLDER` takes.

    Only sampled images can be exported (GATEWAY_FEEDBACK_SAMPLE). Nothing is overwritten.

    Example: gradserve feedback export corrections --corrected
    """
    from control.feedback.export import export_folder, export_parquet, open_store

    if (folder is None) == (parquet is None):
        raise typer.BadParameter("name either a folder, or a file with --parquet")
    opened = open_store(store_file(store))
    if parquet is not None:
        typer.echo(f"{export_parquet(opened, parquet):,} calls written to {parquet}")
        return
    written = export_folder(opened, folder or Path(), corrected_only=corrected)
    listing = ", ".join(f"{name} {count}" for name, count in sorted(written.items()))
    typer.echo(f"{written.total():,} images written to {folder}{f': {listing}' if listing else ''}")
    if not written:
        typer.echo("no image with feedback was sampled: set GATEWAY_FEEDBACK_SAMPLE above 0", err=True)
    elif len(written) > 1:
        typer.echo(f"next: gradserve train --data imagefolder:{folder}")
