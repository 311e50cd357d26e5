import pytest

from control.bulk.storage import open_storage, public_name


def test_a_path_and_its_file_url_are_the_same_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_bytes(b"text")
    for place in (str(tmp_path), tmp_path.as_uri()):
        storage = open_storage(place)
        assert (storage.names(), storage.read("a/b.txt"), storage.is_file()) == (["a/b.txt"], b"text", False)
    assert open_storage(str(tmp_path / "a" / "b.txt")).is_file()


def test_a_url_that_pyarrow_does_not_know_is_read_and_written_by_fsspec():
    storage = open_storage("memory://bulk")
    storage.files.create_dir(storage.root)
    storage.write("a.txt", b"text")
    assert (open_storage("memory://bulk").names(), storage.read("a.txt")) == (["a.txt"], b"text")


def test_an_unknown_scheme_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="nonsense"):
        open_storage("nonsense://bucket/folder")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    storage = open_storage(str(tmp_path))

    storage.write("a.parquet", b"first")
    with pytest.raises(TypeError):
        storage.write("a.parquet", object())
    assert (tmp_path / "a.parquet").read_bytes() == b"first"
    (partial,) = (name for name in storage.names() if name != "a.parquet")
    assert partial.startswith(".a.parquet.")
    assert partial.endswith(".partial")


def test_the_public_name_of_a_url_has_no_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("s3://user:secret@bucket/folder/?secret_key=x") == "s3://bucket/folder"
    assert public_name("photos") == str(tmp_path / "photos")
