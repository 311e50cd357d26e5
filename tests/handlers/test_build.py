"""An archive's identity covers every file in it."""

from __future__ import annotations

import json
import shutil

import pytest

from handlers.build import BUILD, BrokenArchive, read_json, verify_files, write_build


@pytest.fixture
def folder(tmp_path):
    for name, text in (("contract.json", "{}"), ("handlers/model.py", "code"), ("weights.safetensors", "weights")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_identity_is_that_of_names_and_contents_wherever_the_files_lie(folder, tmp_path_factory):
    packed = write_build(folder)
    copied = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "copy")
    assert verify_files(folder) == verify_files(copied) == packed
    assert write_build(folder) == packed, "build.json is no part of it"
    (folder / "handlers" / "model.py").write_text("other code")
    changed = write_build(folder)
    (folder / "handlers" / "model.py").rename(folder / "handlers" / "moved.py")
    assert len({packed, changed, write_build(folder)}) == 3


@pytest.mark.parametrize("name", ["contract.json", "handlers/model.py", "weights.safetensors"])
def test_a_changed_or_missing_file_is_refused_and_named(folder, name):
    write_build(folder)
    (folder / name).write_text("changed")
    with pytest.raises(BrokenArchive, match=f"{name} is not what was packed"):
        verify_files(folder)
    (folder / name).unlink()
    with pytest.raises(BrokenArchive, match=f"{name} is missing"):
        verify_files(folder)


def test_an_edited_list_of_hashes_is_refused(folder):
    write_build(folder)
    build = json.loads((folder / BUILD).read_text())
    build["files"].pop("weights.safetensors")
    (folder / BUILD).write_text(json.dumps(build))
    with pytest.raises(BrokenArchive, match="identity"):
        verify_files(folder)


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "no JSON")])
def test_a_document_that_is_missing_or_no_json_object_is_named(folder, content, reason):
    if content is not None:
        (folder / "facts.json").write_text(content)
    with pytest.raises(BrokenArchive, match=rf"facts\.json .*{reason}|facts\.json {reason}"):
        read_json(folder / "facts.json")
