import base64
import hashlib
import json
import zipfile

import pytest

from control.archive import inspect_archive, inspect_copy
from control.errors import ArchiveError

CONTRACT = {
    "schema": 1,
    "name": "cifar10",
    "version": "1.0.0",
    "classes": ["cat", "dog"],
    "input": {"height": 32, "width": 32, "mean": [0, 0, 0], "std": [1, 1, 1]},
    "architecture": "resnet18_small",
    "explain": {"layer": "layer3"},
    "engine": {"name": "eager"},
}
REFERENCE = {"tolerance": 0.01, "images": [base64.b64encode(b"png").decode()], "probabilities": [[0.25, 0.75]]}
MANIFEST = {"model": {"modelName": "cifar10", "modelVersion": "1.0.0"}}


@pytest.fixture
def write(tmp_path):
    def write(contract=CONTRACT, reference=REFERENCE, manifest=MANIFEST, extra=()):
        path = tmp_path / "cifar10-1.0.0.mar"
        with zipfile.ZipFile(path, "w") as members:
            for name, data in (
                ("contract.json", contract),
                ("reference.json", reference),
                ("MAR-INF/MANIFEST.json", manifest),
            ):
                if data is not None:
                    members.writestr(name, json.dumps(data))
            for info in extra:
                members.writestr(info, "content")
        return path

    return write


def test_a_good_archive_has_version_classes_and_reference(write):
    path = write()
    archive = inspect_archive(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (archive.version, archive.classes) == ("1.0.0", ("cat", "dog"))
    assert archive.reference.images == (b"png",)


def test_the_fallbacks_reference_is_read_too(write):
    other = {"tolerance": 0.02, "probabilities": [[0.5, 0.5]]}
    reference = inspect_archive(write(reference={**REFERENCE, "fallback": other})).reference
    assert reference.fallback is not None
    assert reference.fallback.probabilities == ((0.5, 0.5),)
    assert reference.fallback.images == reference.images


def test_another_hash_than_the_expected_one_is_refused(write):
    with pytest.raises(ArchiveError, match="expected 000000000000"):
        inspect_archive(write(), "0" * 64)


@pytest.mark.parametrize(
    ("field", "value"), [("version", "../../evil"), ("version", 1), ("name", "a/b"), ("name", ""), ("version", "1\n")]
)
def test_a_name_or_version_that_could_be_a_path_is_refused(write, field, value):
    manifest = {"model": {"modelName": "cifar10", "modelVersion": value if field == "version" else "1.0.0"}}
    with pytest.raises(ArchiveError, match=f"contract field {field} is"):
        inspect_archive(write(contract={**CONTRACT, field: value}, manifest=manifest))


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "entry",
    ["../evil.py", "handlers/../../evil.py", "/etc/passwd", "..\\evil.py", "C:\\evil.py", link("handlers/link")],
)
def test_an_entry_that_would_leave_its_folder_is_refused(write, entry):
    with pytest.raises(ArchiveError, match="would leave the folder"):
        inspect_archive(write(extra=[entry]))


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    path = tmp_path / "x.mar"
    path.write_bytes(b"nonsense")
    with pytest.raises(ArchiveError, match="no zip"):
        inspect_archive(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArchiveError, match=r"x\.mar: cannot be read.*gradserve versions"):
        inspect_archive(tmp_path / "x.mar")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"contract": None}, "contract.json is missing"),
        ({"reference": None}, "reference.json is missing"),
        ({"manifest": None}, "MANIFEST.json is missing"),
        ({"contract": {**CONTRACT, "schema": 4}}, "field schema is 4, expected 1 or 2 or 3"),
        ({"contract": {k: v for k, v in CONTRACT.items() if k != "classes"}}, "field classes is None, expected a list"),
        ({"contract": {**CONTRACT, "classes": ["cat"]}}, "two or more different names"),
        ({"contract": {**CONTRACT, "version": "2.0.0"}}, "differ"),
        ({"reference": {**REFERENCE, "probabilities": [[1.0]]}}, "expected 1 lists of 2 numbers"),
        ({"reference": {**REFERENCE, "images": ["%%%"]}}, "expected images in base64"),
        ({"reference": {**REFERENCE, "tolerance": 2}}, "tolerance is 2"),
        ({"manifest": []}, "not a JSON object"),
    ],
)
def test_an_invalid_archive_is_refused_with_the_reason(write, changes, reason):
    with pytest.raises(ArchiveError, match=reason):
        inspect_archive(write(**changes))


def test_the_checked_copy_stays_when_the_file_is_replaced(write, tmp_path):
    path, store = write(), tmp_path / "store"
    store.mkdir()
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    archive = inspect_copy(path, sha256, store)
    path.write_bytes(b"other code")
    assert archive.path == store / f"{sha256}.mar"
    assert archive.path.read_bytes() == content
    assert inspect_copy(path, sha256, store) == archive, "a second call returns the same copy"


def test_a_copy_of_other_bytes_is_refused_with_the_files_name_and_removed(write, tmp_path):
    (tmp_path / "store").mkdir()
    with pytest.raises(ArchiveError, match=r"cifar10-1\.0\.0\.mar: its SHA-256"):
        inspect_copy(write(), "0" * 64, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_deeply_nested_json_is_refused(write):
    path = write()
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()} | {"contract.json": b"[" * 100_000}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    with pytest.raises(ArchiveError, match="cannot be read as JSON"):
        inspect_archive(path)


def test_a_damaged_compressed_entry_is_refused(write):
    path = write()
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)
        begin = new.getinfo("contract.json").header_offset + 30 + len("contract.json")
    damaged = bytearray(path.read_bytes())
    damaged[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(bytes(damaged))
    with pytest.raises(ArchiveError, match=r"contract\.json cannot be read"):
        inspect_archive(path)
