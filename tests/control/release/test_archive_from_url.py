"""Archives that operators name by a URL."""

import json
import zipfile
from dataclasses import replace

import pytest

from contracts.plan import Plan, Release
from control.archive import file_sha256
from control.errors import ArchiveError
from control.release import archive_source

CONTRACT = {
    "schema": 1,
    "name": "m",
    "version": "2.0",
    "classes": ["cat", "dog"],
    "input": {"height": 32, "width": 32, "mean": [0, 0, 0], "std": [1, 1, 1]},
    "architecture": "resnet18_small",
    "explain": {"layer": "layer3"},
    "engine": {"name": "eager"},
}
REFERENCE = {"tolerance": 0.01, "images": ["cG5n"], "probabilities": [[0.25, 0.75]]}
PLAN = Plan(1, "m", Release("1.0", "m-1.0.mar", "0" * 64))


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "elsewhere" / "any-name.mar"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("contract.json", json.dumps(CONTRACT))
        members.writestr("reference.json", json.dumps(REFERENCE))
        members.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelName": "m", "modelVersion": "2.0"}}))
    return path


def test_an_archive_is_fetched_from_its_url_into_the_model_store(packed, tmp_path):
    store, url = tmp_path / "store", packed.as_uri()
    for found in (archive_source.fetch(PLAN, url, store, print), archive_source.fetch_new(url, store)):
        assert (found.path, found.version) == (store / "m-2.0.mar", "2.0")
    assert [path.name for path in store.iterdir()] == ["m-2.0.mar"]
    assert archive_source.source_of(url) == url
    assert archive_source.source_of(str(packed)) is None


def test_a_version_to_go_back_to_is_fetched_again_and_other_bytes_are_refused(packed, tmp_path):
    release = Release("2.0", "m-2.0.mar", file_sha256(packed), source=packed.as_uri())
    assert archive_source.find_again(release, tmp_path / "store", print) == release
    (tmp_path / "store" / "m-2.0.mar").unlink()
    with pytest.raises(ArchiveError, match="it was replaced"):
        archive_source.find_again(replace(release, sha256="1" * 64), tmp_path / "store", print)
