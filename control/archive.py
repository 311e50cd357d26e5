"""What the agent and the operator read of an archive (.mar, a zip) without torch: bytes, contract, reference answers.

Nothing is unpacked here. What TorchServe will unpack later is judged first: hash, member names, version, contract.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
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

# A zip bomb is above it.
_MAX_MEMBER_BYTES = archive_reference.MAX_BYTES


@dataclass(frozen=True)
class Archive:
    """A checked archive: its file, its SHA-256, its contract, its reference."""

    path: Path
    sha256: str
    contract: Contract
    reference: Reference
    signed: str = "no"
    """`no`, `not checked` where a signature is there and no keys are trusted, or `by` and the key's file name."""

    @property
    def version(self) -> str:
        """The version inside, under which TorchServe registers it."""
        return self.contract.version

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities."""
        return self.contract.classes


def signature_path(archive: Path) -> Path:
    """Return the place of the archive's signature, beside it."""
    return archive.with_name(f"{archive.name}.sig")


def checksum_beside(path: Path) -> str | None:
    """Return the SHA-256 in the file `<archive>.sha256`; None where there is none."""
    try:
        return path.with_name(f"{path.name}.sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def load_trusted_keys(paths: Sequence[Path]) -> TrustedKeys | None:
    """Return the public keys in the files `paths`; None where none are given, and signatures are not checked.

    Raises:
        SigningKeyError: one of them cannot be used.
        NoModelSigning: what checks signatures is not installed.
    """
    if not paths:
        return None
    try:
        from control.signatures import read_trusted_keys  # noqa: PLC0415 - a second and 40 MB, for those who check
    except ImportError as error:
        raise NoModelSigning from error
    return read_trusted_keys(paths)


def file_sha256(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inspect_archive(
    path: Path, expected_sha256: str | None = None, *, trusted: TrustedKeys | None = None, signature: Path | None = None
) -> Archive:
    """Return the archive at `path` after every check that needs no server.

    With `trusted`, nothing of it is parsed before one of those keys has signed its bytes, by the file `signature`
    (default: the one beside it).

    Raises:
        ArchiveError: it is not there, its hash is not `expected_sha256`, no trusted key has signed it, it is no zip, a
            member would leave the folder it is unpacked into, or its manifest, contract or reference are missing or
            contradict each other.
        SigningKeyError: the file of a trusted key was removed or replaced.
    """
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise ArchiveError(path, f"cannot be read ({error.strerror})") from error
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ArchiveError(path, f"its SHA-256 is {sha256[:12]}…, the plan says {expected_sha256[:12]}…")
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
        raise ArchiveError(path, "is no zip file, or a broken one") from error
    contract = _parse_contract(path, data, manifest)
    return Archive(path, sha256, contract, _parse_reference(path, reference, len(contract.classes)), signed)


def inspect_copy(path: Path, sha256: str, store: Path, trusted: TrustedKeys | None = None) -> Archive:
    """Copy the archive at `path` into the folder `store` and return the copy after the checks of `inspect_archive`.

    The copy is what TorchServe reads: the file at `path` may be another one by then. With `trusted`, one of those keys
    has to have signed it, by the file beside `path`.

    Raises:
        ArchiveError: it cannot be copied, or `inspect_archive` refuses the copy; the text names `path`.
    """
    copy = store / copy_name(sha256)
    try:
        if not copy.exists():
            part = copy.with_suffix(".part")
            shutil.copyfile(path, part)
            part.replace(copy)
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
        # The raw name: zipfile itself would turn backslashes and drop what follows a zero byte.
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
    except (ValueError, NotImplementedError, RuntimeError) as error:  # RecursionError, of deep nesting, is the third
        raise ArchiveError(path, f"{name} cannot be read as JSON") from error
    if not isinstance(data, dict):
        raise ArchiveError(path, f"{name} is no JSON object")
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
