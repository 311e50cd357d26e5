"""Packs a model into an archive for TorchServe that carries all it needs: handlers, contract, weights, reference.

The archive is a zip made by torch-model-archiver. Its identity (`build.json`) is a hash over every file staged into it,
our handlers included, so that changed code is a new build and never a stale one. No MLflow and no torch is imported
here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

import contracts
import handlers
from contracts import model as model_contract
from contracts import reference as archive_reference
from contracts.reference import Reference
from handlers.build import BUILD, digest, write_build
from training.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

REQUIRED = ("contract.json", "weights.safetensors", "reference.json")
REFERENCE_IMAGES = 32

_HANDLERS = Path(handlers.__file__).parent
_CODE = (_HANDLERS, Path(str(contracts.__file__)).parent)
_ENTRY_NAME = "image_handler.py"
_CONFIG_NAME = "model-config.yaml"
REFUSED = "gate-refused.json"
# What `evaluate` says about a version comes after its archive, and is no part of what serves; nor is another's failure.
_LEFT_OUT = {"MODEL_CARD.md", REFUSED}
_RESERVED = {"handlers", "contracts", "MAR-INF", BUILD, _ENTRY_NAME, _CONFIG_NAME}

MODEL_CONFIG = """\
# Read by TorchServe at registration. Worker counts are the agent's and stand in no archive: they would overrule it.
batchSize: 16
# 1 ms: whatever waits is answered together, and a lone request waits for nobody. 0 would become 100 ms.
maxBatchDelay: 1
responseTimeout: 30
startupTimeout: 120
maxRetryTimeoutInSec: 60
jobQueueSize: 100
"""


def package_directory(source: Path, store: Path) -> Path:
    """The archive `<name>-<version>.mar` in `store`, packed from `source` unless an equal one lies there.

    Args:
        source: a folder of `contract.json`, `weights.safetensors`, `reference.json` and whatever other files shall
            travel along; sub-folders, hidden files, `MODEL_CARD.md` and `gate-refused.json` do not.
        store: TorchServe's model store; the archive appears there in one step, its `.sha256` after it.

    Raises:
        ExportError: a required file is missing, a name is taken by the archive's own files, or `store` is `source`.
        ContractError: the contract cannot be used.
    """
    missing = [name for name in REQUIRED if not (source / name).is_file()]
    if missing:
        raise ExportError(f"{source} has no {' and no '.join(missing)}")
    if source.resolve() == store.resolve():
        raise ExportError(f"{store} is the model's own folder: an archive in it would be packed into the next")
    contract = model_contract.load(source / "contract.json")
    store.mkdir(parents=True, exist_ok=True)
    archive = store / f"{contract.name}-{contract.version}.mar"
    lock = FileLock(store / f".{archive.name}.lock")
    with lock, tempfile.TemporaryDirectory(prefix=".packing-", dir=store) as folder:
        stage = Path(folder) / "stage"
        identity = _stage(source, stage)
        checksum = archive.with_name(f"{archive.name}.sha256")
        if checksum.is_file() and _identity_of(archive) == identity:
            return archive
        packed = _run_archiver(contract, stage, Path(folder))
        new_checksum = packed.with_suffix(".sha256")
        new_checksum.write_text(f"{digest(packed)}  {archive.name}\n", encoding="ascii")
        # Without a checksum meanwhile: at no moment does one archive lie beside another's.
        checksum.unlink(missing_ok=True)
        archive.with_name(f"{archive.name}.sig").unlink(missing_ok=True)  # of the bytes of before
        packed.replace(archive)
        new_checksum.replace(checksum)
    return archive


def write_reference(
    path: Path,
    images: Sequence[bytes],
    predict: Callable[[Sequence[bytes]], NDArray[np.float32]],
    *,
    tolerance: float,
    fallback: tuple[Callable[[Sequence[bytes]], NDArray[np.float32]], float] | None = None,
) -> None:
    """Writes `reference.json`: inputs with this version's probabilities, for any server to check itself by.

    Args:
        path: where to.
        images: 32 encoded images.
        predict: the contract's engine, from encoded images to (N, K) probabilities.
        tolerance: the largest difference of a probability that another machine's arithmetic may cause.
        fallback: the same pair for the contract's fallback engine.

    Raises:
        ExportError: not 32 images.
    """
    if len(images) != REFERENCE_IMAGES:
        raise ExportError(f"a reference holds {REFERENCE_IMAGES} images, not {len(images)}")
    inputs = tuple(images)
    other = None if fallback is None else Reference(fallback[1], inputs, _rounded(fallback[0](images)))
    reference = Reference(tolerance, inputs, _rounded(predict(images)), other)
    path.write_text(json.dumps(archive_reference.dump(reference)) + "\n", encoding="utf-8")


def _stage(source: Path, stage: Path) -> str:
    """Lays out in `stage` what goes into the archive and returns its identity."""
    stage.mkdir()
    for path in sorted(source.iterdir()):
        # Folders are left out: the store may well be one of them.
        if path.name.startswith(".") or path.name in _LEFT_OUT or not path.is_file():
            continue
        if path.name in _RESERVED:
            raise ExportError(f"{path} has a name that the archive needs for itself: rename it")
        shutil.copyfile(path, stage / path.name)
    for package in _CODE:
        for path in sorted(package.rglob("*.py")):
            copy = stage / package.name / path.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (stage / _CONFIG_NAME).write_text(MODEL_CONFIG, encoding="utf-8")
    # TorchServe imports the entry as a top-level module: the archiver wants it there too.
    shutil.copyfile(_HANDLERS / _ENTRY_NAME, stage / _ENTRY_NAME)
    # With the code goes its wire: the contract of an older schema is rewritten (contracts/wire.py, `WIRES`).
    contract = model_contract.load(stage / "contract.json")
    model_contract.save(replace(contract, schema=model_contract.SCHEMA), stage / "contract.json")
    return write_build(stage)


def _run_archiver(contract: model_contract.Contract, stage: Path, folder: Path) -> Path:
    """The archive that torch-model-archiver makes of `stage`."""
    work = folder / "work"
    work.mkdir()
    # A process of its own, because the archiver's work folder is `<temporary folder>/<model name>`, which two exports
    # would share.
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", contract.name]
    command += ["--version", contract.version, "--handler", str(stage / _ENTRY_NAME), "--extra-files", str(stage)]
    # Stored, not deflated: half-precision weights hardly shrink, and TorchServe unpacks on a thread that serves
    # requests.
    command += [
        "--config-file",
        str(stage / _CONFIG_NAME),
        "--archive-format",
        "zip-store",
        "--export-path",
        str(folder),
    ]
    result = subprocess.run(  # noqa: S603 - our own interpreter and paths
        command, env={**os.environ, "TMPDIR": str(work)}, capture_output=True, text=True, check=False
    )
    packed = folder / f"{contract.name}.mar"
    if result.returncode != 0 or not packed.is_file():
        raise ExportError(f"torch-model-archiver failed: {result.stderr.strip()[-2000:]}")
    return packed


def _identity_of(archive: Path) -> str | None:
    """The identity of an archive that is there and readable."""
    try:
        with zipfile.ZipFile(archive) as members:
            return str(json.loads(members.read(BUILD))["identity"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _rounded(probabilities: NDArray[np.float32]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(value), 7) for value in row) for row in probabilities)
