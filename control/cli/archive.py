"""The commands for an archive's signature: `gradserve archive sign|verify`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from control.archive import checksum_beside, inspect_archive, load_trusted_keys, signature_path
from control.errors import NoModelSigning
from control.settings import trusted_key_files

archive = typer.Typer(
    help="Sign an archive with a key, or check its signature.\n\n"
    "Example: gradserve archive sign model_store/cifar10-1.0.1.mar --key release.key",
    no_args_is_help=True,
)
File = Annotated[Path, typer.Argument(help="The archive, such as model_store/cifar10-1.0.1.mar.", metavar="PATH.mar")]
PASSWORD = "GRADSERVE_SIGNING_PASSWORD"  # noqa: S105 (the variable's name)


def register(app: typer.Typer) -> None:
    """Add the commands to the `gradserve` command."""
    app.add_typer(archive, name="archive", rich_help_panel="Models")


@archive.command()
def sign(
    path: File,
    key: Annotated[Path, typer.Option(help="The private key, PEM: elliptic-curve, P-256, P-384 or P-521.")],
) -> None:
    """Sign an archive: write PATH.mar.sig, in the format of OpenSSF Model Signing.

    The archive and the checksum beside it are checked first. A key with a password needs GRADSERVE_SIGNING_PASSWORD.

    Example: gradserve archive sign model_store/cifar10-1.0.1.mar --key release.key

    Exit codes: 0 signed, 1 not possible (the reason is printed).
    """
    found = inspect_archive(path, checksum_beside(path))
    sign_with(key, path)
    typer.echo(f"{found.contract.name} {found.version}, SHA-256 {found.sha256}: signed, {signature_path(path)}")


@archive.command()
def verify(
    path: File,
    key: Annotated[
        list[Path] | None,
        typer.Option(help="File of a trusted public key, PEM. Can be repeated.", show_default="AGENT_TRUSTED_KEYS"),
    ] = None,
) -> None:
    """Check that a trusted key signed the archive. Its content is parsed only after that.

    Example: gradserve archive verify model_store/cifar10-1.0.1.mar --key release.pub

    Exit codes: 0 signed by a trusted key (its name is printed), 1 not signed by one (the reason is printed).
    """
    trusted = load_trusted_keys(key or trusted_key_files())
    if trusted is None:
        raise typer.BadParameter("name a public key: --key, or AGENT_TRUSTED_KEYS")
    found = inspect_archive(path, trusted=trusted)
    typer.echo(f"{found.contract.name} {found.version}, SHA-256 {found.sha256}: signed {found.signed}")


def check_key(key: Path) -> None:
    """Raise if the private key `key` cannot sign. Call it before packing, which takes minutes.

    Raises:
        SigningKeyError: the key cannot be used.
        NoModelSigning: the package model-signing is not installed.
    """
    try:
        from control.signatures import read_private_key
    except ImportError as error:
        raise NoModelSigning from error
    read_private_key(key, os.environ.get(PASSWORD))


def sign_with(key: Path, path: Path) -> None:
    """Write the signature of the archive `path` beside it.

    Raises:
        SigningKeyError: the key cannot be used.
        NoModelSigning: the package model-signing is not installed.
    """
    check_key(key)
    from control.signatures import sign_archive

    sign_archive(path, signature_path(path), key, os.environ.get(PASSWORD))
