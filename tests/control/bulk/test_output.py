import pyarrow as pa
import pytest

from control.bulk import output as output_folder
from control.bulk.output import Done, Form, failed_entry, open_output, write_table
from control.bulk.source import Batch, Piece

CAT = {
    "class": "cat",
    "confidence": 0.9,
    "top": [{"class": "cat", "confidence": 0.9}, {"class": "dog", "confidence": 0.1}],
}
EXPLAINED = {
    "class": "cat",
    "confidence": 0.9,
    "target": {"class": "cat", "confidence": 0.9},
    "method": "cam",
    "strength": 1.5,
    "heatmap": {"height": 1, "width": 2, "values": "AP8="},
    "familiar": True,
    "familiarity": 0.5,
    "similar": [{"id": 3, "class": "cat", "similarity": 0.8}],
}


def images(*files, kept=None):
    return Batch(files, [None] * len(files), [b""] * len(files), kept or {})


def test_rows_are_typed_and_an_error_is_a_row():
    form = Form(2, evidence=False, from_parquet=False, kept=(), about='{"version": "1"}')
    table = form.table(images("a.png", "b.png"), [{**CAT, "familiar": False}, failed_entry("file", "gone")])
    assert table.schema.metadata == {b"gradserve": b'{"version": "1"}'}
    assert {field.name: str(field.type) for field in table.schema} == {
        "file": "string",
        "class": "string",
        "confidence": "double",
        "top": "list<item: struct<class: string, confidence: double>>",
        "familiar": "bool",
        "error": "struct<code: string, detail: string>",
    }
    answered, failed = table.to_pylist()
    assert answered == {"file": "a.png", **CAT, "familiar": False, "error": None}
    assert failed["class"] is None
    assert failed["error"] == {"code": "file", "detail": "gone"}


def test_evidence_has_columns_of_its_own_and_null_for_what_the_model_cannot_give():
    form = Form(1, evidence=True, from_parquet=False, kept=(), about="")
    without = {**EXPLAINED, "familiar": {"unavailable": "no features"}, "similar": {"unavailable": "no index"}}
    full, partial = form.table(images("a", "b"), [EXPLAINED, without]).to_pylist()
    assert full["heatmap"] == {"height": 1, "width": 2, "values": b"\x00\xff"}
    assert (full["familiarity"], full["similar"]) == (0.5, EXPLAINED["similar"])
    assert (full["method"], full["strength"]) == ("cam", 1.5)
    assert (partial["familiar"], partial["similar"], partial["class"]) == (None, None, "cat")


def test_kept_columns_keep_their_type():
    label = pa.field("label", pa.int16())
    form = Form(1, evidence=False, from_parquet=True, kept=(label,), about="")
    batch = Batch(["t.parquet"], [5], [b""], {"label": pa.array([3], pa.int16())})
    table = form.table(batch, [CAT])
    assert table.schema.field("label") == label
    assert table.to_pylist()[0] | {"top": None} == {
        "file": "t.parquet", "row": 5, "class": "cat", "confidence": 0.9, "familiar": None, "error": None, "label": 3,
        "top": None,
    }  # fmt: skip


@pytest.mark.parametrize(("from_parquet", "row"), [(False, None), (True, 4)])
def test_what_is_written_is_done(tmp_path, from_parquet, row):
    form = Form(1, evidence=False, from_parquet=from_parquet, kept=(), about="")
    output = open_output(str(tmp_path / "out"))
    output_folder.write_about(output, {})
    assert len(Done(output)) == 0
    batch = Batch(["a"], [row], [b""], {})
    write_table(output, "part-1.parquet", [form.table(batch, [CAT])])
    done = Done(output)
    assert len(done) == 1
    assert Piece("a", 1, row) in done
    assert Piece("b", 1, row) not in done
    assert Piece("a", 1, 5) not in done


def test_what_a_killed_run_left_half_written_is_removed_and_is_not_done(tmp_path):
    output = open_output(str(tmp_path))
    output_folder.write_about(output, {"version": "1"})
    (tmp_path / ".part-1.parquet.0.partial").write_bytes(b"half")
    assert output_folder.read_about(output) == {"version": "1"}
    output_folder.remove_partial(output)
    assert output.names() == ["_gradserve.json"]
    assert len(Done(output)) == 0


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"it has other files \(notes\.txt\): name a new folder"):
        output_folder.read_about(open_output(str(tmp_path)))
    with pytest.raises(ValueError, match="it is a file"):
        open_output(str(tmp_path / "notes.txt"))
