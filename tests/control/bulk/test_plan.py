from dataclasses import replace

import pytest

from control.bulk.output import open_output, write_table
from control.bulk.plan import Asked, make_plan
from control.bulk.source import Batch
from control.errors import ArchiveError, InputUnusable, OutputUnusable

CAT = {"class": "cat", "confidence": 0.9}


@pytest.fixture
def plan(released, tmp_path):
    """`plan(input, archive=…, **options)`: the plan with the output `tmp_path/out`."""

    def plan(place, archive=released, **options):
        return make_plan(Asked(str(place), str(tmp_path / "out"), **options), archive)

    return plan


def answer(plan, shard):
    """Write the shard's file as an actor does."""
    files = [piece.file for piece in shard.pieces for _ in range(piece.rows)]
    rows = [None if piece.row is None else piece.row + n for piece in shard.pieces for n in range(piece.rows)]
    batch = Batch(files, rows, [b""] * len(files), {})
    write_table(open_output(plan.job.output), shard.name, [plan.job.form.table(batch, [CAT] * len(files))])


def test_a_second_run_does_only_the_rest_even_if_images_were_added(plan, photos):
    first = plan(photos, file_rows=3)
    assert (first.images, first.done, len(first.shards)) == (7, 0, 3)
    answer(first, first.shards[1])
    (photos / "0.png").write_bytes(b"new")
    second = plan(photos, file_rows=2)
    assert (second.images, second.done) == (5, 3)
    answered = {piece.file for piece in first.shards[1].pieces}
    assert not answered & {piece.file for shard in second.shards for piece in shard.pieces}
    for shard in second.shards:
        answer(second, shard)
    assert (plan(photos).shards, plan(photos).done) == ((), 8)


def test_row_groups_that_are_answered_are_not_answered_again(plan, write_parquet, tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", [b"0", b"1", b"2", b"3"])
    write_parquet(tmp_path / "in" / "_common" / "_metadata.parquet", [b"0"])
    first = plan(tmp_path / "in", file_rows=1)
    assert (first.job.source.column, first.images, len(first.shards)) == ("image", 4, 2)
    answer(first, first.shards[0])
    assert [shard.name for shard in plan(tmp_path / "in", file_rows=1).shards] == [first.shards[1].name]


def test_answers_of_another_model_are_refused_by_both_names(plan, photos, released):
    plan(photos)
    contract = replace(released.contract, version="9.9.9")
    with pytest.raises(OutputUnusable) as refused:
        plan(photos, replace(released, sha256="f" * 64, contract=contract))
    ours, theirs = (
        f"cifar10 {released.version} (archive {released.sha256[:12]}…)",
        "cifar10 9.9.9 (archive ffffffffffff…)",
    )
    assert f"it has the answers of {ours}, not of {theirs}: name another folder, or remove this one" in str(
        refused.value
    )


def test_answers_with_other_options_or_of_another_input_are_refused(plan, photos, tmp_path):
    plan(photos)
    with pytest.raises(OutputUnusable, match="it was written with top_k 1, not 2: name another folder"):
        plan(photos, top_k=2)
    with pytest.raises(OutputUnusable, match=r"it was written with input '.*photos', not '.*photos/a'"):
        plan(photos / "a")


def test_a_folder_with_files_of_something_else_is_refused(plan, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.parquet").write_bytes(b"")
    with pytest.raises(
        OutputUnusable, match=r"out cannot be used: it has other files \(mine.parquet\): name a new folder"
    ):
        plan(photos)


def test_an_archive_of_an_earlier_release_is_refused(plan, photos, released):
    with pytest.raises(ArchiveError, match="pack it again with gradserve package"):
        plan(photos, replace(released, contract=replace(released.contract, schema=2)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"column": "photo"}, "a.parquet has no column 'photo'; it has image, label, class, thumb"),
        ({"column": "label"}, "the column 'label' is int64, and images are bytes"),
        ({"column": "image", "keep": ("class",)}, "the column 'class' cannot be kept: the output has one of its own"),
        ({}, r"2 columns of bytes may be the images: name one by --column \(image, thumb\)"),
    ],
)
def test_a_column_that_cannot_be_used_is_named(plan, write_parquet, tmp_path, options, sentence):
    write_parquet(tmp_path / "a.parquet", [b"0"], label=[1], **{"class": ["x"], "thumb": [b"1"]})
    with pytest.raises(InputUnusable, match=sentence):
        plan(tmp_path / "a.parquet", **options)


@pytest.mark.parametrize("missing", ["nothing", "photos"])
def test_an_input_without_images_is_refused(plan, tmp_path, missing):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "readme.txt").write_text("no image")
    with pytest.raises(InputUnusable, match=r"it has no images \(\.bmp, \.gif, .*\) and no Parquet files"):
        plan(tmp_path / missing)


def test_image_files_and_parquet_files_are_not_mixed(plan, photos, write_parquet):
    write_parquet(photos / "a.parquet", [b"0"])
    with pytest.raises(InputUnusable, match="both images and Parquet files"):
        plan(photos)
    (photos / "a.parquet").unlink()
    with pytest.raises(InputUnusable, match="--column and --keep are about Parquet files"):
        plan(photos, column="image")


def test_a_file_that_is_no_parquet_is_named(plan, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    with pytest.raises(InputUnusable, match=r"a\.parquet"):
        plan(tmp_path / "a.parquet")


def test_explanations_of_large_images_go_in_batches_whose_answer_the_handler_can_send(plan, photos, released):
    large = replace(released.contract, input=replace(released.contract.input, height=1024, width=1024))
    assert plan(photos, evidence=True, archive=replace(released, contract=large)).job.batch == 4
