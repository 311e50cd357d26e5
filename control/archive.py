"""Inspect an archive (.mar, a zip) without torch and without unpacking it: hash, member names, contract, reference.

The agent and the operator's commands inspect every archive before TorchServe unpacks it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from contracts import model as model_contract
from contracts import reference as archive_reference
from control.errors import ArchiveError, NoModelSigning

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from contracts.model import Contract
    from contracts.reference import Reference
    from control.signatures import TrustedKeys

# Protects against zip bombs.
_MAX_MEMBER_BYTES = archive_reference.MAX_BYTES


@dataclass(frozen=True)
class Archive:
    """An inspected archive: its file, its SHA-256, its contract, its reference inputs and answers."""

    path: Path
    sha256: str
    contract: Contract
    reference: Reference
    signed: str = "no"
    """`no`, `not checked` if there is a signature but no trusted key, or `by` and the key's file name."""

    @property
    def version(self) -> str:
        """The version in the contract, under which TorchServe registers the archive."""
        return self.contract.version

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the probabilities."""
        return self.contract.classes


def signature_path(archive: Path) -> Path:
    """Return the path of the archive's signature, a file beside it."""
    return archive.with_name(f"{archive.name}.sig")


def checksum_beside(path: Path) -> str | None:
    """Return the SHA-256 in the file `<archive>.sha256`; None without a readable one."""
    try:
        return path.with_name(f"{path.name}.sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def load_trusted_keys(paths: Sequence[Path]) -> TrustedKeys | None:
    """Return the public keys in the files `paths`; None for no files: signatures are not checked then.

    Raises:
        SigningKeyError: one of them cannot be used.
        NoModelSigning: the package model-signing is not installed.
    """
    if not paths:
        return None
    try:
        from control.signatures import read_trusted_keys  # noqa: PLC0415 - takes a second and 40 MB
    except ImportError as error:
        raise NoModelSigning from error
    return read_trusted_keys(paths)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inspect_archive(
    path: Path, expected_sha256: str | None = None, *, trusted: TrustedKeys | None = None, signature: Path | None = None
) -> Archive:
    """Return the archive at `path` after all checks that need no server.

    With `trusted` keys, its content is parsed only after a check that one of them signed its bytes, by the file
    `signature` (default: the one beside it).

    Raises:
        ArchiveError: the file is missing, its hash is not `expected_sha256`, no trusted key signed it, it is no zip, a
            member would leave the folder it is unpacked into, or its manifest, contract or reference are missing or
            contradict each other.
        SigningKeyError: the file of a trusted key was removed or replaced.
    """
    try:
        sha256 = file_sha256(path)
    except FileNotFoundError as error:
        remedy = "`gradserve versions` lists the versions in the model store"
        raise ArchiveError(path, f"cannot be read, there is no such file: {remedy}") from error
    except OSError as error:
        raise ArchiveError(path, f"cannot be read ({error.strerror})") from error
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ArchiveError(path, f"its SHA-256 is {sha256[:12]}…, expected {expected_sha256[:12]}…")
    signature = signature or signature_path(path)
    if trusted is not None:
        signed = f"by {trusted.check(path, signature)}"
    else:
        signed = "not checked" if signature.exists() else "no"
    try:
        with zipfile.ZipFile(path) as members:
            _refuse_escaping_members(path, members)
            manifest = _read_json(path, members, "MAR-INF/MANIFEST.json")
            data = _read_json(path, members, "contract.json")
            reference = _read_json(path, members, archive_reference.FILE)
    except zipfile.BadZipFile as error:
        raise ArchiveError(path, "is no zip file, or is damaged") from error
    contract = _parse_contract(path, data, manifest)
    return Archive(path, sha256, contract, _parse_reference(path, reference, len(contract.classes)), signed)


def inspect_copy(path: Path, sha256: str, store: Path, trusted: TrustedKeys | None = None) -> Archive:
    """Copy the archive at `path` into the folder `store` and return the copy after the checks of `inspect_archive`.

    TorchServe reads the copy, because the file at `path` may change later. With `trusted` keys, one of them must have
    signed the copy, by the file beside `path`.

    Raises:
        ArchiveError: the file cannot be copied, or `inspect_archive` refuses the copy; the text names `path`.
    """
    copy = store / copy_name(sha256)
    try:
        if not copy.exists():
            partial = copy.with_suffix(".part")
            shutil.copyfile(path, partial)
            partial.replace(copy)
    except OSError as error:
        raise ArchiveError(path, f"cannot be read or copied ({error.strerror})") from error
    try:
        return inspect_archive(copy, sha256, trusted=trusted, signature=signature_path(path))
    except ArchiveError as error:
        copy.unlink(missing_ok=True)
        raise ArchiveError(path, error.problem) from error


def copy_name(sha256: str) -> str:
    """Return the file name of the agent's private copy of an archive."""
    return f"{sha256}.mar"


def _refuse_escaping_members(path: Path, members: zipfile.ZipFile) -> None:
    for info in members.infolist():
        # The raw name: zipfile would change backslashes and cut the name at a zero byte.
        name = info.orig_filename
        parts = PurePosixPath(name.replace("\\", "/")).parts
        is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
        if not parts or name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\x00" in name or is_link:
            raise ArchiveError(path, f"its entry {name!r} would leave the folder it is unpacked into")


def _read_json(path: Path, members: zipfile.ZipFile, name: str) -> dict[str, Any]:
    try:
        info = members.getinfo(name)
        if info.file_size > _MAX_MEMBER_BYTES:
            raise ArchiveError(path, f"{name} has {info.file_size} bytes, more than {_MAX_MEMBER_BYTES}")
        data = json.loads(members.read(info))
    except KeyError as error:
        raise ArchiveError(path, f"{name} is missing; pack it with `gradserve package`") from error
    except (ValueError, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:  # RecursionError too
        raise ArchiveError(path, f"{name} cannot be read as JSON") from error
    if not isinstance(data, dict):
        raise ArchiveError(path, f"{name} is not a JSON object")
    return data


def _parse_contract(path: Path, data: dict[str, Any], manifest: dict[str, Any]) -> Contract:
    try:
        contract = model_contract.parse(data)
    except model_contract.ContractError as error:
        raise ArchiveError(path, str(error)) from error
    model = manifest.get("model")
    inside = model.get("modelVersion") if isinstance(model, dict) else None
    if inside != contract.version:
        raise ArchiveError(path, f"manifest version {inside!r} and contract version {contract.version!r} differ")
    return contract


def _parse_reference(path: Path, data: dict[str, Any], classes: int) -> Reference:
    try:
        return archive_reference.parse(data, classes)
    except archive_reference.BadReference as error:
        raise ArchiveError(path, str(error)) from error
