"""Choose who answers, from the options that `predict` and `explain` share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.errors import ControlError, NoPlan
from control.settings import home_directory

if TYPE_CHECKING:
    from control.images.files import ImageFile
    from control.images.sources import Source

RELEASED = Path("model_store/released")

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES", help="Image files, folders, patterns like 'photos/**/*.jpg', or - for the standard input."
    ),
]
Url = Annotated[
    str | None,
    typer.Option(envvar="GRADSERVE_URL", help="Ask this gateway.", show_default="that of the running gradserve up"),
]
ArchiveFile = Annotated[
    Path | None,
    typer.Option(
        "--archive",
        help="Load this archive and ask no gateway.",
        metavar="FILE.mar",
        show_default="without a gateway: the plan's stable version, else the released model",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File with the API key.", show_default="the environment variable GRADSERVE_KEY", metavar="PATH"),
]
Version = Annotated[
    str | None, typer.Option(help="Version to ask.", show_default="the gateway chooses", metavar="VERSION")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model to ask; `gradserve models list` lists them.", show_default="the default model", metavar="MODEL"
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per image and line: `file` and the answer or `error`.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values, with a header line.")]


def choose_images(names: list[str]) -> list[ImageFile]:
    """Return the images that the operator names, at least one.

    Raises:
        typer.BadParameter: the names stand for no image.
    """
    from control.images.files import find_images  # noqa: PLC0415 - not for `--help`

    images = find_images(names)
    if not images:
        raise typer.BadParameter("no images there: name a file, or a folder with .png, .jpg, .webp, .bmp or .gif files")
    return images


def choose_source(
    url: str | None, archive: Path | None, key_file: Path | None, version: str | None, model: str | None = None
) -> Source:
    """Return the gateway at `url` or the archive; with neither, the running stack's gateway, else an archive.

    Raises:
        ControlError: the address is no URL, the key file cannot be read, the archive cannot be loaded, or `version` or
            `model` chooses among what an archive has one of.
    """
    from control.images.sources import GatewaySource  # noqa: PLC0415 - not for `--help`
    from control.stack.running import find_running  # noqa: PLC0415 - as above

    # A gateway that the environment names gives way to an archive that the operator names.
    if archive is None:
        running = find_running(home_directory())
        address = url or (running.gateway if running else None)
        if address is not None:
            if not address.startswith(("http://", "https://")):
                raise ControlError(
                    f"the gateway's address {address!r} is no URL: write http://HOST:PORT or https://HOST"
                )
            return GatewaySource(address, read_key(key_file), version, model)
    for option, value in (("model", model), ("version", version)):
        if value is not None:
            raise ControlError(f"--{option} chooses at a gateway, and an archive is one {option}: remove --{option}")
    from control.images.archive_source import ArchiveSource  # noqa: PLC0415 - as above

    return ArchiveSource(archive or default_archive())


def read_key(key_file: Path | None) -> str | None:
    """Return the API key in the file, else in GRADSERVE_KEY. It is never an argument, which other users can see.

    Raises:
        ControlError: the file cannot be read, or is empty.
    """
    if key_file is None:
        return os.environ.get("GRADSERVE_KEY") or None
    try:
        key = key_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ControlError(f"the key file {key_file} cannot be read: {error}") from error
    if not key:
        raise ControlError(f"the key file {key_file} is empty: `gradserve keys make NAME > {key_file}` writes a key")
    return key


def default_archive() -> Path:
    """Return the archive of the plan's stable version; without a plan, the released model's, packed if need be.

    Raises:
        ControlError: the plan cannot be read, or there is no model.
    """
    from control.cli.release import model_store  # noqa: PLC0415 - not for `--help`
    from control.release.plan_store import open_store  # noqa: PLC0415 - as above
    from control.stack.stack import pack  # noqa: PLC0415 - as above

    try:
        return model_store() / open_store(home_directory()).read().stable.archive
    except NoPlan:
        if RELEASED.is_dir():
            return pack(RELEASED, model_store())
        raise ControlError(
            "there is neither a running gateway nor a model here: name a gateway with --url, or an archive with "
            "--archive FILE.mar"
        ) from None
