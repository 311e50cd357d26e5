"""Files, folders, patterns and the standard input become the images that they name, each once."""

from pathlib import Path

import pytest

from control.images.files import ImageFile, find_images


@pytest.fixture
def photos(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "a-heatmap.png", ".hidden.png", "sub/c.webp", ".git/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(images):
    return [str(image.relative) for image in images]


def test_a_folder_stands_for_its_images_sorted_without_hidden_files_and_overlays(photos):
    assert names(find_images([str(photos)])) == ["a.png", "b.JPG", "sub/c.webp"]


def test_a_pattern_that_the_shell_left_alone_is_searched(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert [image.name for image in find_images(["**/*.webp", "*.png"])] == ["sub/c.webp", "a.png"]


def test_a_named_file_counts_whatever_its_suffix_and_only_once(photos):
    notes = str(photos / "notes.txt")
    assert names(find_images([notes, notes])) == ["notes.txt"]


def test_a_name_that_matches_nothing_is_kept_so_that_it_can_be_reported(tmp_path):
    (image,) = find_images([str(tmp_path / "missing*.png")])
    with pytest.raises(FileNotFoundError):
        image.read()


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "[1].png").write_bytes(b"x")
    assert names(find_images([str(tmp_path / "[1].png")])) == ["[1].png"]


def test_overlays_lie_beside_the_image_or_in_the_same_sub_folder_of_another_folder(photos):
    *_, image = find_images([str(photos)])
    assert image.overlay_path(None) == photos / "sub" / "c-heatmap.png"
    assert image.overlay_path(Path("out")) == Path("out/sub/c-heatmap.png")
    assert ImageFile("stdin", None, Path("stdin")).overlay_path(None) == Path("stdin-heatmap.png")
