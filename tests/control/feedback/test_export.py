"""Feedback becomes a folder that a training takes, or a Parquet file."""

import pyarrow.parquet as pq
import pytest

from control.errors import ControlError, FeedbackUnusable
from control.feedback.export import export_folder, export_parquet, open_store, summarise
from gateway.feedback.store import Feedback, LoggedCall
from training.data.folder import ImageFolder


def test_the_summary_counts_calls_images_and_corrections(store):
    found = summarise(store)
    assert (found.calls, found.images, found.feedback, found.confirmed) == (4, 3, 3, 1)
    assert found.corrected == (("cat", "dog", 2),)


def test_the_folder_is_one_that_a_training_takes(store, tmp_path):
    assert export_folder(store, tmp_path / "out") == {"dog": 1, "cat": 1}
    found = ImageFolder.find(tmp_path / "out", "train")
    assert found.classes == ("cat", "dog")
    assert [path.name for path, _ in found.files] == ["r2.jpg", "r1.png"]


def test_only_corrected_images_on_request(store, tmp_path):
    assert export_folder(store, tmp_path / "out", corrected_only=True) == {"dog": 1}


def test_a_folder_with_files_is_not_written_to(store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ControlError, match="not an empty folder: name another one"):
        export_folder(store, tmp_path / "out")


def test_names_that_callers_chose_leave_no_folder_and_hide_no_file(store, tmp_path):
    store.add([LoggedCall("..", 1.0, "pets", "1.0.0", "cat", 0.9, None, {}, b"\x89PNG")])
    store.put(Feedback("..", 1.0, "cat", "", ""))
    export_folder(store, tmp_path / "out")
    assert (tmp_path / "out" / "cat" / "image.png").is_file()
    store.put(Feedback("..", 1.0, "../cat", "", ""))
    with pytest.raises(ControlError, match="cannot be the name of a folder"):
        export_folder(store, tmp_path / "other")


def test_parquet_has_every_call_with_its_feedback(store, tmp_path):
    assert export_parquet(store, tmp_path / "calls.parquet") == 4
    rows = pq.read_table(tmp_path / "calls.parquet").to_pylist()
    assert [row["feedback_class"] for row in rows] == ["dog", "cat", "dog", None]
    assert rows[0]["image"].startswith(b"\x89PNG")
    assert rows[2]["image"] is None
    assert rows[0]["at"].timestamp() == 100.0
    with pytest.raises(ControlError, match="exists"):
        export_parquet(store, tmp_path / "calls.parquet")


def test_a_missing_store_is_named_with_the_setting_that_makes_one(tmp_path):
    with pytest.raises(FeedbackUnusable, match="GATEWAY_FEEDBACK_FILE"):
        open_store(tmp_path / "feedback.db")
