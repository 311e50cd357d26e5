"""Find an archive, check it, compare it with the stable version and copy it into the model store."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from control import archive_download
from control.archive import Archive, checksum_beside, file_sha256, inspect_archive, signature_path
from control.errors import ArchiveError, ImpossibleMove, WouldBreakCallers
from control.release import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.model import Contract
    from contracts.plan import Plan, Release
    from control.signatures import TrustedKeys

MOST_BYTES = 16_000_000_000


def fetch(
    plan: Plan, what: str, model_store: Path, say: Callable[[str], None], trusted: TrustedKeys | None = None
) -> Archive:
    """Return the checked archive that `what` names, in the model store, with its signature if it has one.

    `what` is a registered version, a URL, a file, or a version in the model store. With `trusted` keys, the archive
    must be signed by one of them.

    Raises:
        ArchiveError: the archive must not be loaded.
        ImpossibleMove: the registered version is another model's.
        RegistryUnusable: the registry does not answer or has no such version.
    """
    if reference := registry.parse_reference(what):
        return _fetch_registered(plan, reference, model_store, say, trusted)
    if archive_download.is_url(what):
        with _downloaded(what, model_store) as downloaded:
            return _store_for_plan(plan, inspect_archive(downloaded, trusted=trusted), model_store)
    given = Path(what)
    path = given if given.suffix == ".mar" else model_store / f"{plan.model}-{what}.mar"
    others = [] if path.is_file() else sorted(model_store.glob(f"*-{what}.mar"))
    if others:
        name = others[0].name.removesuffix(f"-{what}.mar")
        raise ArchiveError(
            path, f"is not in the model store; {others[0].name} is another model: {_how_to_serve(name, others[0])}"
        )
    return _store_for_plan(plan, inspect_archive(path, checksum_beside(path), trusted=trusted), model_store)


def fetch_new(what: str, model_store: Path, trusted: TrustedKeys | None = None) -> Archive:
    """Return the checked archive of a model that the plan does not serve yet, copied from the file or URL `what`.

    Raises:
        ArchiveError: the archive must not be loaded.
    """
    if archive_download.is_url(what):
        with _downloaded(what, model_store) as downloaded:
            return copy_to_store(inspect_archive(downloaded, trusted=trusted), model_store)
    given = Path(what)
    path = given if given.is_file() else model_store / given.name
    return copy_to_store(inspect_archive(path, checksum_beside(path), trusted=trusted), model_store)


def find_again(release: Release, model_store: Path, say: Callable[[str], None]) -> Release:
    """Return the release with the current hash of its archive, for a version that has to be loaded again.

    `gradserve package` writes a checksum beside an archive, so changed bytes without a matching one are refused.

    Raises:
        ArchiveError: the archive is missing or broken, holds another version, or was changed and has no checksum.
    """
    path = _stored(release, model_store)
    archive = inspect_archive(path, checksum_beside(path) or release.sha256)
    if archive.version != release.version:
        raise ArchiveError(path, f"holds version {archive.version}, not {release.version}")
    if archive.sha256 != release.sha256:
        say(f"{path.name} was packed again since {release.version} was stable: its new bytes are loaded and verified")
    return replace(release, sha256=archive.sha256)


def source_of(what: str) -> str | None:
    """Return the URL that agents fetch the archive `what` from; None if it is in a folder that they share."""
    return what if archive_download.is_url(what) else None


def _stored(release: Release, model_store: Path) -> Path:
    """Return the path of the release's archive in the model store; it is downloaded if it is missing there.

    Raises:
        ArchiveError: its source does not have it.
    """
    path = model_store / release.archive
    if not path.exists() and release.source is not None:
        archive_download.download(release.source, path, most_bytes=MOST_BYTES, sha256=release.sha256, allows_http=True)
    return path


@contextmanager
def _downloaded(url: str, model_store: Path) -> Iterator[Path]:
    """Yield the path of the archive at `url` in a folder that is removed afterwards."""
    model_store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=model_store) as folder:
        name = unquote(urlsplit(url).path).rpartition("/")[2]
        # By plain HTTP too: the operator sees the address, and the agents check the SHA-256 that is written.
        yield archive_download.download(url, Path(folder) / name, most_bytes=MOST_BYTES, allows_http=True)


def compare(plan: Plan, archive: Archive, model_store: Path, *, yes: bool, say: Callable[[str], None]) -> None:
    """Raise `WouldBreakCallers` if callers would notice the new version; with `yes` report the differences instead.

    Raises:
        WouldBreakCallers: there are differences, and `yes` is False.
    """
    try:
        stable = inspect_archive(_stored(plan.stable, model_store))
        differences = contract_differences(stable.contract, archive.contract)
    except ArchiveError as error:
        differences = [f"the differences for callers are unknown: the stable version's {error}"]
    if differences and not yes:
        raise WouldBreakCallers(archive.version, differences)
    for difference in differences:
        say(f"{archive.version}: {difference} (accepted with --yes)")


def contract_differences(stable: Contract, new: Contract) -> list[str]:
    """Return the differences that callers of the stable version would notice, as phrases."""
    differences = []
    gone = [name for name in stable.classes if name not in new.classes]
    added = [name for name in new.classes if name not in stable.classes]
    if gone or added:
        differences.append(f"classes gone: {', '.join(gone) or 'none'}, new: {', '.join(added) or 'none'}")
    methods = [method for method in stable.explain.methods if method not in new.explain.methods]
    if methods:
        differences.append(f"explanation methods gone: {', '.join(methods)}")
    sizes = [f"{contract.input.width}x{contract.input.height}" for contract in (stable, new)]
    if sizes[0] != sizes[1]:
        differences.append(f"input size {sizes[1]} instead of {sizes[0]} (heatmaps as numbers have that size)")
    return differences


def _fetch_registered(
    plan: Plan,
    reference: registry.Reference,
    model_store: Path,
    say: Callable[[str], None],
    trusted: TrustedKeys | None,
) -> Archive:
    """Return the registered archive; it is downloaded unless the model store has the same bytes."""
    if reference.name != plan.model:
        raise ImpossibleMove(f"{reference.name} is another model than {plan.model}: add --model {reference.name}")
    release = registry.find(reference)
    say(f"models:/{release.name}/{release.number} is {release.version}")
    home = model_store / f"{plan.model}-{release.version}.mar"
    is_signed = trusted is None or signature_path(home).is_file()
    if home.is_file() and file_sha256(home) == release.sha256 and is_signed:
        return _store_for_plan(plan, inspect_archive(home, release.sha256, trusted=trusted), model_store)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=model_store) as folder:
        path = registry.fetch(release, Path(folder))
        return _store_for_plan(plan, inspect_archive(path, release.sha256, trusted=trusted), model_store)


def _store_for_plan(plan: Plan, archive: Archive, model_store: Path) -> Archive:
    name = archive.contract.name
    if name != plan.model:
        raise ArchiveError(
            archive.path, f"holds the model {name}, not {plan.model}: {_how_to_serve(name, archive.path)}"
        )
    return copy_to_store(archive, model_store)


def copy_to_store(archive: Archive, model_store: Path) -> Archive:
    """Copy the checked archive and its signature into the model store, and return the archive there.

    Raises:
        ArchiveError: the model store has other bytes under its name.
    """
    path = archive.path
    home = model_store / f"{archive.contract.name}-{archive.version}.mar"
    if path.resolve() != home.resolve():
        if home.exists() and inspect_archive(home).sha256 != archive.sha256:
            raise ArchiveError(path, f"{home.name} is in the model store with other bytes: use a new version")
        if signature_path(path).is_file():
            _copy(signature_path(path), signature_path(home))
        _copy(path, home)
    return replace(archive, path=home)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _how_to_serve(name: str, path: Path) -> str:
    return f"deploy it beside the others with gradserve deploy {path} --model {name}"
