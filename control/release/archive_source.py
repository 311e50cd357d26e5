"""An archive's way into the model store: found where the operator says, checked, compared with the stable version."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from control.archive import Archive, checksum_beside, file_sha256, inspect_archive, signature_path
from control.errors import ArchiveError, ImpossibleMove, WouldBreakCallers
from control.release import registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.model import Contract
    from contracts.plan import Plan, Release
    from control.signatures import TrustedKeys


def fetch(
    plan: Plan, what: str, model_store: Path, say: Callable[[str], None], trusted: TrustedKeys | None = None
) -> Archive:
    """Return the checked archive that `what` names, in the model store, with its signature if it has one.

    `what` is a registered version, a file, or a version in the model store. With `trusted` keys, one has to have
    signed it.

    Raises:
        ArchiveError: it must not be loaded.
        ImpossibleMove: it is registered for another model.
        RegistryUnusable: it cannot be had from the registry.
    """
    if reference := registry.parse_reference(what):
        return _fetch_registered(plan, reference, model_store, say, trusted)
    given = Path(what)
    path = given if given.suffix == ".mar" else model_store / f"{plan.model}-{what}.mar"
    others = [] if path.is_file() else sorted(model_store.glob(f"*-{what}.mar"))
    if others:
        name = others[0].name.removesuffix(f"-{what}.mar")
        raise ArchiveError(
            path, f"is not in the model store; {others[0].name} is another model: {_beside(name, others[0])}"
        )
    return _keep(plan, inspect_archive(path, checksum_beside(path), trusted=trusted), model_store)


def find_again(release: Release, model_store: Path, say: Callable[[str], None]) -> Release:
    """Return the release with the bytes that its archive has now, for a version that is loaded once more.

    An archive that was packed again has the checksum of its new bytes beside it; one without was replaced by somebody.

    Raises:
        ArchiveError: the archive is gone, broken, holds another version, or is another than it was and has no checksum.
    """
    path = model_store / release.archive
    archive = inspect_archive(path, checksum_beside(path) or release.sha256)
    if archive.version != release.version:
        raise ArchiveError(path, f"holds version {archive.version}, not {release.version}")
    if archive.sha256 != release.sha256:
        say(f"{path.name} was packed again since {release.version} was stable: its new bytes are loaded and verified")
    return replace(release, sha256=archive.sha256)


def compare(plan: Plan, archive: Archive, model_store: Path, *, yes: bool, say: Callable[[str], None]) -> None:
    """Says what callers would notice; does nothing where that is nothing, or accepted with `yes`.

    Raises:
        WouldBreakCallers: it is something.
    """
    try:
        stable = inspect_archive(model_store / plan.stable.archive)
        differences = contract_differences(stable.contract, archive.contract)
    except ArchiveError as error:
        differences = [f"what callers would notice is unknown, for the stable version's own {error}"]
    if differences and not yes:
        raise WouldBreakCallers(archive.version, differences)
    for difference in differences:
        say(f"{archive.version}: {difference} (accepted with --yes)")


def contract_differences(stable: Contract, new: Contract) -> list[str]:
    """Return what callers of the stable version would notice, each as a sentence's part."""
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
    """The registered archive; downloaded unless these very bytes are in the model store."""
    if reference.name != plan.model:
        raise ImpossibleMove(f"the plan is of {plan.model}, not of {reference.name}")
    release = registry.find(reference)
    say(f"models:/{release.name}/{release.number} is {release.version}")
    home = model_store / f"{plan.model}-{release.version}.mar"
    is_signed = trusted is None or signature_path(home).is_file()
    if home.is_file() and file_sha256(home) == release.sha256 and is_signed:
        return _keep(plan, inspect_archive(home, release.sha256, trusted=trusted), model_store)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=model_store) as folder:
        path = registry.fetch(release, Path(folder))
        return _keep(plan, inspect_archive(path, release.sha256, trusted=trusted), model_store)


def _keep(plan: Plan, archive: Archive, model_store: Path) -> Archive:
    name = archive.contract.name
    if name != plan.model:
        raise ArchiveError(
            archive.path, f"holds the model {name}, the plan is of {plan.model}: {_beside(name, archive.path)}"
        )
    return copy_to_store(archive, model_store)


def copy_to_store(archive: Archive, model_store: Path) -> Archive:
    """Return the checked archive in the model store, where it is copied to.

    Raises:
        ArchiveError: other bytes are there under its name.
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


def _beside(name: str, path: Path) -> str:
    return f"serve it from a home of its own: GRADSERVE_HOME=.gradserve-{name} gradserve serve {path} --port 8001"
