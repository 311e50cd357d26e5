import pyarrow as pa
import pytest
from pyarrow import parquet

from control.bulk.source import (
    Piece,
    Source,
    list_files,
    list_pieces,
    make_shards,
    parse_shard,
    read_batches,
)


def shards_of(source, rows):
    return list(make_shards(list_pieces(source, list_files(source)), rows))


def contents(source, shard, length):
    return [list(batch.contents) for batch in read_batches(source, shard, length)]


def test_files_are_listed_with_sub_folders_in_one_order_without_hidden_ones(photos):
    (photos / ".thumbs").mkdir()
    (photos / ".thumbs" / "8.png").write_bytes(b"hidden")
    names = ["6.jpeg", "7.png", "_5.bmp", "a/1.png", "a/2.JPG", "b/4.gif", "b/c/3.webp"]
    assert list_files(Source(str(photos))) == names
    assert list_files(Source(str(photos / "7.png"))) == ["7.png"]


def test_every_image_is_in_one_shard_and_in_one_batch(photos):
    source = Source(str(photos))
    shards = shards_of(source, 3)
    assert [shard.rows for shard in shards] == [3, 3, 1]
    names = [piece.file for shard in shards for piece in shard.pieces]
    assert names == list_files(source)
    read = [image for shard in shards for batch in contents(source, shard, 2) for image in batch]
    assert read == [name.encode() for name in names]


def test_the_name_of_a_shard_follows_from_its_images(photos):
    first, again, other = (shards_of(Source(str(photos)), rows)[0] for rows in (3, 3, 4))
    assert first.name == again.name != other.name
    assert parse_shard(first.dump()) == first


def test_a_file_that_disappears_is_in_its_batch_with_the_reason(photos):
    source = Source(str(photos))
    (shard,) = shards_of(source, 100)
    (photos / "7.png").unlink()
    ((first, gone, *_),) = contents(source, shard, 32)
    assert first == b"6.jpeg"
    assert gone.endswith("No such file or directory")


def test_row_groups_are_the_pieces_of_parquet_files(tmp_path, write_parquet):
    write_parquet(tmp_path / "a.parquet", [b"0", b"1", b"2"])
    write_parquet(tmp_path / "b" / "c.parquet", [b"3", b"4"])
    source = Source(str(tmp_path), "image")
    shards = shards_of(source, 3)
    assert [shard.pieces for shard in shards] == [
        (Piece("a.parquet", 2, 0, 0), Piece("a.parquet", 1, 2, 1)),
        (Piece("b/c.parquet", 2, 0, 0),),
    ]
    batches = list(read_batches(source, shards[0], 32))
    assert [(batch.contents, batch.rows) for batch in batches] == [([b"0", b"1"], [0, 1]), ([b"2"], [2])]
    assert parse_shard(shards[0].dump()) == shards[0]


@pytest.mark.parametrize("is_struct", [False, True], ids=["bytes", "Hugging Face"])
def test_images_are_bytes_or_objects_with_bytes_and_columns_are_kept(tmp_path, is_struct):
    images = [b"0", None, b"2"]
    column = [{"bytes": image, "path": "x.png"} for image in images] if is_struct else images
    parquet.write_table(pa.table({"image": column, "label": [7, 8, 9]}), tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), "image", ("label",))
    (shard,) = shards_of(source, 10)
    (batch,) = read_batches(source, shard, 32)
    assert batch.contents == [b"0", "the image is null", b"2"]
    assert (batch.files, batch.rows) == (["a.parquet"] * 3, [0, 1, 2])
    assert batch.kept["label"].to_pylist() == [7, 8, 9]
