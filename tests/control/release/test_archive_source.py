"""Archives that operators name by a version, a file or a URL, and what callers would notice of them."""

from dataclasses import replace

import pytest

from contracts.plan import Plan, Release
from control.archive import file_sha256, inspect_archive, signature_path
from control.errors import ArchiveError, WouldBreakCallers
from control.release import archive_source

PLAN = Plan(1, "m", Release("1.0", "m-1.0.mar", "0" * 64))


@pytest.fixture
def packed(tmp_path, write_archive):
    return write_archive(tmp_path / "elsewhere" / "any-name.mar", version="2.0")


@pytest.fixture
def stable(tmp_path, write_archive):
    """The stable version 1.0, in the model store."""
    path = write_archive(tmp_path / "store" / "m-1.0.mar")
    return Plan(1, "m", Release("1.0", path.name, file_sha256(path)))


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


def test_a_file_is_copied_into_the_model_store_with_its_signature(packed, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    signature_path(packed).write_text("signed")
    found = archive_source.fetch(PLAN, str(packed), store, print)
    assert (found.path, found.path.read_bytes()) == (store / "m-2.0.mar", packed.read_bytes())
    assert signature_path(found.path).read_text() == "signed"
    assert archive_source.fetch(PLAN, "2.0", store, print) == found, "and is found there by its version"


def test_other_bytes_under_a_versions_name_are_refused(packed, tmp_path, write_archive):
    write_archive(tmp_path / "store" / "m-2.0.mar", version="2.0", comment=b"other bytes")
    with pytest.raises(ArchiveError, match=r"m-2\.0\.mar is in the model store with other bytes: use a new version"):
        archive_source.fetch(PLAN, str(packed), tmp_path / "store", print)


def test_an_archive_of_another_model_is_refused_with_the_command_that_adds_it(tmp_path, write_archive):
    other = write_archive(tmp_path / "pets-2.0.mar", name="pets", version="2.0")
    for what in ("2.0", str(other)):
        with pytest.raises(ArchiveError, match=r"gradserve deploy .*pets-2\.0\.mar --model pets"):
            archive_source.fetch(PLAN, what, tmp_path, print)


@pytest.mark.parametrize(
    ("new", "difference"),
    [
        ({"classes": ["cat", "fox"]}, "classes gone: dog, new: fox"),
        ({"classes": ["cat", "dog", "fox"]}, "classes gone: none, new: fox"),
        ({"input": {"height": 2, "width": 3, "mean": [0, 0, 0], "std": [1, 1, 1]}}, "input size 3x2 instead of 1x1"),
        ({"explain": {"methods": ["gradcam"]}}, "explanation methods gone: "),
    ],
)
def test_a_version_that_callers_would_notice_is_refused_unless_accepted(
    stable, tmp_path, write_archive, new, difference
):
    archive = inspect_archive(write_archive(tmp_path / "m-2.0.mar", version="2.0", **new))
    with pytest.raises(WouldBreakCallers, match=difference):
        archive_source.compare(stable, archive, tmp_path / "store", yes=False, say=print)
    said = []
    archive_source.compare(stable, archive, tmp_path / "store", yes=True, say=said.append)
    assert [line.startswith(f"2.0: {difference}") for line in said] == [True]


def test_a_version_with_the_same_contract_is_no_change_for_callers(stable, packed, tmp_path):
    said = []
    archive_source.compare(stable, inspect_archive(packed), tmp_path / "store", yes=False, say=said.append)
    assert said == []


def test_without_the_stable_versions_archive_the_differences_are_unknown(packed, tmp_path):
    with pytest.raises(WouldBreakCallers, match=r"unknown: the stable version's archive m-1\.0\.mar"):
        archive_source.compare(PLAN, inspect_archive(packed), tmp_path, yes=False, say=print)


def test_a_version_that_holds_another_one_is_not_gone_back_to(tmp_path, write_archive):
    path = write_archive(tmp_path / "m-1.0.mar", version="9.0")
    with pytest.raises(ArchiveError, match=r"holds version 9\.0, not 1\.0"):
        archive_source.find_again(Release("1.0", path.name, file_sha256(path)), tmp_path, print)
