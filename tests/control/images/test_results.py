"""The same results in each printed form."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import typer

from control.images.files import ImageFile
from control.images.results import Csv, JsonLines, Result, Table, choose_printer, failed, print_all, progress, row
from gradserve.answers import parse_evidence, parse_prediction

IMAGE = ImageFile("photos/a.png", Path("photos/a.png"), Path("a.png"))
PREDICTION = {
    "class": "cat",
    "confidence": 0.75,
    "top": [{"class": "cat", "confidence": 0.75}, {"class": "dog", "confidence": 0.25}],
    "familiar": False,
    "model": {"name": "pets", "version": "1.0.0"},
}
PREDICTED = Result(IMAGE, parse_prediction(PREDICTION))
REFUSED = Result(IMAGE, failed("image_unreadable", "the image is cut off"))


def test_a_prediction_is_a_row_of_its_classes_by_rank():
    assert row(PREDICTED) == {
        "file": "photos/a.png",
        "overlay": None,
        "error": None,
        "class": "cat",
        "confidence": 0.75,
        "familiar": False,
        "model": "pets",
        "version": "1.0.0",
        "class_2": "dog",
        "confidence_2": 0.25,
    }


def test_evidence_that_the_version_cannot_give_leaves_its_cells_empty():
    absent = {"unavailable": "packed without evidence"}
    told = {"target": {"class": "dog", "confidence": 0.25}, "method": "gradcam", "strength": absent, "familiar": absent}
    told |= {"familiarity": absent, "similar": absent, "classes": absent, "test": absent}
    cells = row(Result(IMAGE, parse_evidence({**PREDICTION, **told})))
    assert (cells["target"], cells["method"], cells["familiar"]) == ("dog", "gradcam", None)
    assert not cells.keys() & {"classes", "kept", "removed", "verdict"}


def test_json_lines_hold_the_gateways_document_or_the_error(capsys):
    form = JsonLines()
    for result in (PREDICTED, REFUSED):
        form.add(result)
    answer, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert answer == {"file": "photos/a.png", **PREDICTION}
    assert error["error"] == {"code": "image_unreadable", "detail": "the image is cut off"}


def test_csv_has_a_line_for_errors_too(capsys):
    form = Csv(["class", "confidence"])
    for result in (PREDICTED, REFUSED):
        form.add(result)
    answer, error = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert answer == {"file": "photos/a.png", "class": "cat", "confidence": "0.75", "error": ""}
    assert error == {
        "file": "photos/a.png",
        "class": "",
        "confidence": "",
        "error": "image_unreadable: the image is cut off",
    }


def test_the_table_leaves_out_empty_columns_and_sends_errors_to_the_standard_error(capsys):
    form = Table(["class", "confidence", "overlay"])
    for result in (PREDICTED, REFUSED):
        form.add(result)
    form.close()
    printed = capsys.readouterr()
    assert "75.0%" in printed.out
    assert "overlay" not in printed.out.lower()
    assert printed.err == "photos/a.png: image_unreadable: the image is cut off\n"


@pytest.mark.parametrize(("options", "form"), [({}, Table), ({"as_json": True}, JsonLines), ({"as_csv": True}, Csv)])
def test_results_are_printed_in_the_form_that_is_asked_for(options, form):
    assert type(choose_printer(["class"], [], **{"as_json": False, "as_csv": False} | options)) is form


def test_comma_separated_values_have_more_columns_than_the_table(capsys):
    choose_printer(["class"], ["model"], as_json=False, as_csv=True).add(PREDICTED)
    assert capsys.readouterr().out == "file,class,model,error\nphotos/a.png,cat,pets,\n"


def test_only_one_form_can_be_asked_for():
    with pytest.raises(typer.BadParameter, match="choose one"):
        choose_printer(["class"], [], as_json=True, as_csv=True)


def test_failures_are_counted_and_images_are_shown_beside_a_table_alone(capsys):
    for printer, shown in ((Table(["class"]), 2), (JsonLines(), 0)):
        seen = []
        assert print_all(iter([PREDICTED, REFUSED]), printer, 2, seen.append) == 1
        assert len(seen) == shown
    assert "75.0%" not in capsys.readouterr().err


def test_a_line_that_is_printed_beside_the_progress_bar_stands_on_a_line_of_its_own(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress(2, is_shown=True) as count:
        count()
        with count.aside():
            typer.echo("a.png: no image", err=True)
        count()
    shown = terminal.getvalue()
    assert re.search(r"\x1b\[2K(\x1b\[\?25h)?a\.png: no image\n", shown), shown  # after the bar's line was erased
    assert "2/2" in shown
