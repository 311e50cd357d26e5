"""`gradserve explain`: an overlay beside each image, and never in the place of another file."""

import json

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from control.errors import ControlError

OVERLAY = b"\x89PNG overlay"


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    for name in ("GRADSERVE_KEY", "GRADSERVE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(f"image-of-{name}".encode())


@pytest.fixture
def gateway(start_gateway):
    return start_gateway()


@pytest.fixture
def explain(gateway):
    _, url = gateway

    def explain(*arguments):
        return CliRunner().invoke(app, ["explain", "--url", url, *arguments], catch_exceptions=False)

    return explain


def test_the_overlay_lies_beside_the_image(explain, tmp_path):
    result = explain("photos")
    assert result.exit_code == 0
    assert (tmp_path / "photos" / "cat-heatmap.png").read_bytes() == OVERLAY
    assert "photos/dog-heatmap.png" in result.stdout


def test_a_second_run_replaces_nothing_without_force_and_explains_no_overlay(explain, tmp_path):
    explain("photos")
    overlay = tmp_path / "photos" / "cat-heatmap.png"
    overlay.write_bytes(b"mine")
    result = explain("photos")
    assert (result.exit_code, overlay.read_bytes()) == (1, b"mine")
    assert "--force replaces it, --output DIR moves it" in result.stderr
    assert not (tmp_path / "photos" / "cat-heatmap-heatmap.png").exists()
    assert explain("photos", "--force").exit_code == 0
    assert overlay.read_bytes() == OVERLAY


def test_output_names_another_folder(explain, tmp_path):
    explain("photos/cat.png", "--output", "heat/maps")
    assert (tmp_path / "heat" / "maps" / "cat-heatmap.png").exists()
    assert not (tmp_path / "photos" / "cat-heatmap.png").exists()


def test_two_images_with_one_overlay_are_not_mixed_up_even_with_force(explain, tmp_path):
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"image-of-dog")
    result = explain("photos", "--force", "--json")
    cat_jpg, cat_png, _ = (json.loads(line) for line in result.stdout.splitlines())
    assert (cat_jpg["class"], cat_png["error"]["code"]) == ("dog", "overlay_taken")


def test_the_options_reach_the_gateway_and_the_answer_the_table(explain, gateway):
    result = explain(
        "photos/cat.png", "--target", "dog", "--method", "cam", "--coverage", "0.9", "--test", "--size", "64",
        "--model", "photos",
    )  # fmt: skip
    (_, evidence), (_, overlay) = gateway[0].calls
    assert evidence == {"target": "dog", "method": "cam", "coverage": "0.9", "test": "true", "heatmap": "none",
                        "model": "photos"}  # fmt: skip
    assert overlay == {"target": "dog", "method": "cam", "size": "64", "version": "1.0.0", "model": "photos"}
    head = result.stdout.splitlines()[0].split()
    assert head == ["file", "class", "confidence", "target", "familiar", "classes", "verdict", "overlay"]
    assert "cat frog" in result.stdout
    assert "The hot region decides." in result.stdout


def test_json_names_the_overlay(explain):
    found = json.loads(explain("photos/cat.png", "--json").stdout)
    assert (found["target"]["class"], found["overlay"]) == ("cat", "photos/cat-heatmap.png")


def test_an_unknown_class_stops_before_the_next_image(explain, gateway):
    with pytest.raises(ControlError, match="there is no class unicorn"):
        explain("photos", "--target", "unicorn")
    assert len(gateway[0].calls) == 1


def test_a_file_that_fails_does_not_stop_the_rest(explain, tmp_path):
    (tmp_path / "photos" / "bad.png").write_bytes(b"bad:")
    result = explain("photos", "photos/missing.png")
    assert result.exit_code == 1
    assert "photos/bad.png: image_unreadable: no image" in result.stderr
    assert "photos/missing.png: file: there is no such file" in result.stderr
    assert (tmp_path / "photos" / "dog-heatmap.png").exists()
    assert not (tmp_path / "photos" / "bad-heatmap.png").exists()


def test_an_overlay_is_shown_where_it_is_asked_for(explain):
    assert "\x1b_G" in explain("photos/cat.png", "--show", "kitty").stdout
    assert "\x1b" not in explain("photos/dog.png").stdout  # no terminal
