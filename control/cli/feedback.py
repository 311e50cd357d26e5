"""The commands for callers' feedback and logged calls: `feedback show|export`, `drift`, `labels`, `replay`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.cli.train import DEFAULT_CACHE, Cache
from control.settings import home_directory

if TYPE_CHECKING:
    from control.feedback.drift import Verdict
    from control.feedback.replay import Replay

PANEL = "Feedback"
DAY_S = 86_400.0
_DRIFT, _TOO_FEW = 3, 4

feedback = typer.Typer(
    help="Show and export callers' feedback and the calls it is about.\n\nExample: gradserve feedback show",
    no_args_is_help=True,
)
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
Archive = Annotated[
    Path | None,
    typer.Option(
        "--archive", help="The model.", metavar="FILE.mar", show_default="the plan's stable version, else the released"
    ),
]
Days = Annotated[float, typer.Option(min=0.001, help="Days to look back.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `gradserve` command."""
    app.add_typer(feedback, name="feedback", rich_help_panel=PANEL)
    for command in (drift, labels, replay):
        app.command(rich_help_panel=PANEL)(command)


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


def drift(  # noqa: PLR0917 - every option is an argument
    days: Days = 1.0,
    reference: Annotated[
        str,
        typer.Option(
            help="held-out (images that the training held out), earlier (the calls before), or a folder of images.",
            metavar="held-out | earlier | FOLDER",
        ),
    ] = "held-out",
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.2, help="Largest share of false alarms.")] = 0.01,
    archive: Archive = None,
    store: StoreFile = None,
    cache: Cache = DEFAULT_CACHE,
    *,
    as_json: AsJson = False,
) -> None:
    """Compare the calls of the last days with a reference: confidence, class mix, share of unfamiliar images.

    The verdict is drift if a difference is significant and large. Without any change, at most --alpha of the runs give
    a false alarm. It needs no images in the store, only the calls (GATEWAY_FEEDBACK_FILE).

    Example: gradserve drift --days 7 --reference earlier

    Exit codes: 0 no drift, 1 not possible (the reason is printed), 3 drift, 4 too few calls for a verdict.
    """
    from control.feedback.drift import answers_of, compare
    from control.feedback.export import open_store, reading
    from control.feedback.reference import folder_answers, held_out_answers
    from control.images.choice import default_archive

    opened, since = open_store(store_file(store)), time.time() - days * DAY_S
    with reading(opened):
        recent = answers_of(opened.calls(since=since))
        earlier = answers_of(opened.calls(until=since)) if reference == "earlier" else None
    if earlier is None:
        model = archive or default_archive()
        if reference == "held-out":
            earlier = held_out_answers(model, cache, home_directory())
        else:
            earlier = folder_answers(model, Path(reference))
    found = compare(earlier, recent, alpha=alpha)
    if as_json:
        typer.echo(json.dumps(found.dump()))
    else:
        _print_drift(found)
    raise typer.Exit({"none": 0, "drift": _DRIFT, "too_few": _TOO_FEW}[found.decision])


def _print_drift(found: Verdict) -> None:
    from control.cli.status import columns, output
    from control.feedback.drift import LEAST_EFFECT, LEAST_IMAGES

    if found.decision == "too_few":
        typer.echo(
            f"no verdict: {found.recent:,} calls against {found.reference:,}; each side needs {LEAST_IMAGES}: wait for "
            "more calls, or change --days or --reference"
        )
        return
    table = columns("", "test", "effect", "drift from", "p", "")
    for row in found.comparisons:
        mark = "[red]drift[/red]" if row.is_drift else "[green]ok[/green]"
        bound = f"{LEAST_EFFECT[row.about]:g}"
        table.add_row(mark, row.test, f"{row.effect:.3f}", bound, f"{row.p:.2g}", row.sentence)
    output().print(table)
    verdict = "drift" if found.decision == "drift" else "no drift"
    rate = f"false alarms: at most {found.false_alarm_rate:.2%} of the runs"
    typer.echo(f"{verdict}: {found.recent:,} calls against {found.reference:,}; {rate}")


def labels(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder with one folder of images for each class.", show_default="the images with feedback"
        ),
    ] = None,
    archive: Archive = None,
    store: StoreFile = None,
    *,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object: images, unreadable, suspects (name, label, likely, quality)."
        ),
    ] = False,
) -> None:
    """Find labels that are likely wrong, worst first, by confident learning (cleanlab).

    The model should not have learnt from these images: it has learnt their wrong labels too, and finds fewer of them.

    Example: gradserve labels photos --json

    Exit codes: 0 done, 1 not possible (the reason is printed).
    """
    from contextlib import closing

    from control.archive import inspect_archive
    from control.cli.status import columns, output
    from control.feedback.labels import find_wrong_labels, in_feedback, in_folder
    from control.images.archive_source import ArchiveSource
    from control.images.choice import default_archive
    from control.images.results import progress

    images = in_folder(folder) if folder is not None else in_feedback(store_file(store))
    model = archive or default_archive()
    classes = inspect_archive(model).contract.classes
    with closing(ArchiveSource(model)) as source, progress(len(images), is_shown=not as_json) as count:
        found = find_wrong_labels(images, classes, source, count)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    for name in found.unreadable:
        typer.echo(f"{name}: no image", err=True)
    if found.suspects:
        table = columns("image", "label", "rather", "confidence in the label")
        for suspect in found.suspects:
            table.add_row(suspect.name, suspect.label, suspect.likely, f"{suspect.quality:.1%}")
        output().print(table)
    typer.echo(f"{len(found.suspects):,} of {found.images:,} labels are likely wrong")


def replay(
    version: Annotated[
        str | None, typer.Argument(help="The candidate in the model store.", show_default="the archive of --archive")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option("--archive", help="The candidate's archive.", metavar="FILE.mar")
    ] = None,
    days: Days = 30.0,
    limit: Annotated[int, typer.Option(min=1, help="Replay at most so many calls, the newest.")] = 2000,
    store: StoreFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Send the logged images through a candidate, and show where it answers differently and what feedback says.

    The candidate is loaded into this process; nothing is deployed. It needs sampled images (GATEWAY_FEEDBACK_SAMPLE).

    Example: gradserve replay 1.0.1 --days 7

    Exit codes: 0 done, 1 not possible (the reason is printed).
    """
    from contextlib import closing

    from control.feedback.export import open_store, reading
    from control.feedback.replay import replay as replay_calls
    from control.images.archive_source import ArchiveSource
    from control.images.results import progress

    if (version is None) == (archive is None):
        raise typer.BadParameter("name the candidate: either its version, or --archive FILE.mar")
    opened = open_store(store_file(store))
    since = time.time() - days * DAY_S
    if archive is None:
        from control.cli.release import model_store

        with reading(opened):
            models = {call.model for call in opened.calls(since=since)}
        if len(models) != 1:
            raise typer.BadParameter(f"the calls are of {len(models)} models: name the candidate by --archive FILE.mar")
        archive = model_store() / f"{models.pop()}-{version}.mar"
    with closing(ArchiveSource(archive)) as source, progress(limit, is_shown=not as_json) as count:
        found = replay_calls(opened, source, since=since, limit=limit, count=count)
    if as_json:
        typer.echo(json.dumps(found.dump()))
        return
    _print_replay(found)


def _print_replay(found: Replay) -> None:
    from control.cli.status import columns, output

    low, high = found.agreement
    typer.echo(
        f"{found.agree:,} of {found.images:,} answers are the same: {found.agree / max(1, found.images):.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}); mean confidence {found.confidence_shift:+.1%}"
    )
    if found.failed:
        typer.echo(f"{found.failed:,} images were refused by the candidate")
    if found.p is not None:
        typer.echo(
            f"with feedback: {found.labelled:,}; right before {found.right_before:,}, now {found.right_now:,} "
            f"(exact McNemar test, p = {found.p:.2g})"
        )
    if found.differences:
        table = columns("was", "now", "calls")
        for was, now, count in found.changes()[:20]:
            table.add_row(was, now, f"{count:,}")
        output().print(table)
        for row in found.differences[:10]:
            typer.echo(f"  {row.request_id}  {row.was} {row.was_confidence:.1%} -> {row.now} {row.now_confidence:.1%}")
