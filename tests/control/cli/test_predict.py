"""`gradserve predict`: an answer or a reason for every file, as a table, JSON lines or comma-separated values."""

import csv
import io
import json

import pytest
from typer.testing import CliRunner

from control.cli.main import app
from control.errors import ControlError, NoGateway


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    for name in ("GRADSERVE_KEY", "GRADSERVE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRADSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog", "boat"):
        (tmp_path / f"{name}.png").write_bytes(f"image-of-{name}".encode())


@pytest.fixture
def predict(start_gateway):
    _, url = start_gateway()

    def predict(*arguments, **options):
        return CliRunner().invoke(app, ["predict", "--url", url, *arguments], catch_exceptions=False, **options)

    return predict


def test_a_table_names_the_class_of_each_file_and_what_is_unfamiliar(predict):
    result = predict("cat.png", "boat.png")
    assert result.exit_code == 0
    head, cat, boat = (line.split() for line in result.stdout.splitlines())
    assert head == ["file", "class", "confidence", "familiar"]
    assert cat == ["cat.png", "cat", "90.0%", "yes"]
    assert boat == ["boat.png", "boat", "90.0%", "no"]


def test_a_file_that_fails_is_named_and_does_not_stop_the_rest(predict, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad:")
    result = predict("missing.png", "bad.png", "cat.png")
    assert result.exit_code == 1
    assert "missing.png: file: there is no such file" in result.stderr
    assert "bad.png: image_unreadable: no image" in result.stderr
    assert "cat.png" in result.stdout


def test_json_has_one_object_per_line(predict, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad:")
    lines = [json.loads(line) for line in predict("cat.png", "bad.png", "--json").stdout.splitlines()]
    assert (lines[0]["file"], lines[0]["class"], lines[0]["model"]["version"]) == ("cat.png", "cat", "1.0.0")
    assert lines[1] == {"file": "bad.png", "error": {"code": "image_unreadable", "detail": "no image"}}


def test_csv_has_a_column_for_each_rank(predict):
    (row,) = csv.DictReader(io.StringIO(predict("cat.png", "--csv", "--top-k", "2").stdout))
    assert (row["class"], row["class_2"], row["confidence_2"], row["familiar"]) == ("cat", "frog", "0.1", "True")
    assert (row["model"], row["version"], row["error"]) == ("cifar10", "1.0.0", "")


def test_an_image_comes_from_the_standard_input(predict):
    result = predict("-", "--json", input=b"image-of-dog")
    assert json.loads(result.stdout)["class"] == "dog"


def test_one_image_for_which_the_gateway_refuses_the_whole_call_is_found(predict, tmp_path):
    (tmp_path / "large.png").write_bytes(b"bad:whole")
    result = predict("cat.png", "large.png", "dog.png", "--json")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer.get("class") for answer in answers] == ["cat", None, "dog"]


def test_a_folder_without_images_is_refused(predict, tmp_path):
    (tmp_path / "empty").mkdir()
    result = predict("empty")
    assert (result.exit_code, "name a file, or a folder" in result.stderr) == (2, True)


def test_a_missing_key_stops_and_names_the_remedy(start_gateway, monkeypatch):
    _, url = start_gateway(key="secret")
    with pytest.raises(ControlError, match="set GRADSERVE_KEY, or name a file with the key by --key-file"):
        CliRunner().invoke(app, ["predict", "--url", url, "cat.png"], catch_exceptions=False)
    monkeypatch.setenv("GRADSERVE_KEY", "secret")
    assert CliRunner().invoke(app, ["predict", "--url", url, "cat.png"]).exit_code == 0


def test_a_gateway_that_does_not_answer_is_named_with_what_to_do():
    with pytest.raises(NoGateway, match=r"start one with `gradserve up`.*--archive FILE\.mar"):
        CliRunner().invoke(app, ["predict", "--url", "http://127.0.0.1:9", "cat.png"], catch_exceptions=False)


def test_version_and_model_are_asked_for(start_gateway):
    gateway, url = start_gateway()
    arguments = ["predict", "--url", url, "cat.png", "--version", "2.0.0", "--model", "photos"]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert gateway.calls == [("/predict/batch", {"top_k": "1", "version": "2.0.0", "model": "photos"})]


def test_a_model_is_refused_for_an_archive():
    with pytest.raises(ControlError, match="remove --model"):
        CliRunner().invoke(app, ["predict", "cat.png", "--archive", "m.mar", "--model", "m"], catch_exceptions=False)


def test_two_forms_at_once_are_refused(predict):
    assert "choose one of --json and --csv" in predict("cat.png", "--json", "--csv").stderr
