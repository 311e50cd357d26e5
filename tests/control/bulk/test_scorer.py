"""The archive's own code answers shards, in a process of its own as on a cluster, and as this installation's does."""

import shutil
from contextlib import closing

import pytest
from pyarrow import dataset

from contracts import wire
from control.bulk.plan import Asked, make_plan
from control.bulk.scorer import GuardedModel, ProcessEnded
from control.images.archive_source import ArchiveSource
from gradserve.answers import parse_batch, parse_evidence


@pytest.fixture(scope="module")
def scored(samples, released, score_without_ray, write_parquet, tmp_path_factory):
    """What was scored: a folder with a broken image and one that disappears, and the same as Parquet with evidence."""
    folder = tmp_path_factory.mktemp("scored")
    photos = folder / "photos"
    photos.mkdir()
    for number, path in enumerate(samples):
        shutil.copy(path, photos / f"{number:03}.png")
    (photos / "100.png").write_bytes(b"no image")
    (photos / "101.png").write_bytes(b"")
    contents = [path.read_bytes() for path in sorted(photos.iterdir())]
    (photos / "102.png").write_bytes(contents[0])
    write_parquet(folder / "photos.parquet", contents, group=64, label=list(range(len(contents))))
    ranked = make_plan(Asked(str(photos), str(folder / "ranked"), top_k=3, file_rows=64), released)
    (photos / "102.png").unlink()
    explained = make_plan(
        Asked(str(folder / "photos.parquet"), str(folder / "explained"), keep=("label",), evidence=True), released
    )
    said = score_without_ray(released.path, ranked, explained)
    tables = {
        name: dataset.dataset(folder / name).to_table().sort_by(key).to_pylist()
        for name, key in (("ranked", "file"), ("explained", "row"))
    }
    return said, tables, contents


def test_the_archives_own_code_answers(scored):
    assert "/gradserve-score-" in scored[0]["code"]


def test_every_image_has_a_row_and_what_failed_its_error(scored):
    said, tables, _ = scored
    assert said["counts"] == [[[64, 0], [39, 3]], [[102, 2]]]
    assert [row["file"] for row in tables["ranked"]] == [f"{number:03}.png" for number in range(103)]
    broken, empty, gone = (row["error"] for row in tables["ranked"][100:])
    assert broken["code"] == empty["code"] == "image_unreadable"
    assert gone["code"] == "file"
    assert gone["detail"].endswith("No such file or directory")
    assert all(row["error"] is None for row in tables["ranked"][:100])


def test_answers_are_bit_equal_to_those_of_the_same_batches_in_this_process(scored, released):
    _, tables, contents = scored
    with closing(ArchiveSource(released.path)) as source:
        expected = source.predict(contents[:96], top_k=3)
    for row, answer in zip(tables["ranked"], expected, strict=False):
        assert (row["class"], row["confidence"], row["familiar"]) == (
            answer.class_name,
            answer.confidence,
            answer.familiar,
        )
        assert row["top"] == [{"class": one.class_name, "confidence": one.confidence} for one in answer.top]


def test_evidence_of_parquet_rows_is_that_of_the_same_batches_in_this_process(scored, released):
    _, tables, contents = scored
    assert [(row["row"], row["label"]) for row in tables["explained"]] == [(n, n) for n in range(102)]
    assert {row["file"] for row in tables["explained"]} == {"photos.parquet"}
    options = wire.Options(images=(wire.ImageOptions(explain=True),) * 32, format="json")
    with closing(ArchiveSource(released.path)) as source:
        document = source._named(source._answer("predict", contents[:32], options))
    for row, answer in zip(tables["explained"], parse_batch(document, parse_evidence, 32), strict=False):
        assert (row["class"], row["confidence"], row["familiar"]) == (
            answer.class_name,
            answer.confidence,
            answer.familiar,
        )
        facts = (answer.familiarity, answer.method, answer.strength)
        assert (row["familiarity"], row["method"], row["strength"]) == facts
        assert [one["id"] for one in row["similar"]] == [one.id for one in answer.similar]
        assert list(row["heatmap"]["values"]) == [round(255 * value) for value in answer.heatmap.values]


class Mortal:
    """A model whose process ends at images that begin with `end`; `asked` has the lengths of the batches."""

    def __init__(self, asked):
        self.asked = asked
        self.has_ended = False

    def answer(self, images, *, top_k, explain):
        assert not self.has_ended
        self.asked.append(len(images))
        if any(image.startswith(b"end") for image in images):
            self.has_ended = True
            raise ProcessEnded
        return [{"class": image.decode(), "top": top_k, "explain": explain} for image in images]


@pytest.mark.parametrize("bad", [(), (0,), (5,), (2, 7), tuple(range(8))])
def test_only_images_that_end_the_process_get_an_error(bad):
    asked = []
    model = GuardedModel(lambda: Mortal(asked))
    images = [b"end" if number in bad else str(number).encode() for number in range(8)]
    entries = model.answer(images, top_k=3, explain=True)
    assert [number for number, entry in enumerate(entries) if "error" in entry] == list(bad)
    for number, entry in enumerate(entries):
        if number in bad:
            assert entry["error"]["code"] == "process_ended"
        else:
            assert entry == {"class": str(number), "top": 3, "explain": True}
    assert asked.count(1) >= 2 * len(bad), "an image alone is tried twice"
    assert bad or asked == [8]


def test_a_model_that_answers_no_image_is_given_up():
    model = GuardedModel(lambda: Mortal([]))
    with pytest.raises(RuntimeError, match="the process with the model ended at each of 32 images"):
        model.answer([b"end"] * 40, top_k=1, explain=False)
    model = GuardedModel(lambda: Mortal([]))
    model.answer([b"0"], top_k=1, explain=False)
    assert len(model.answer([b"end"] * 40, top_k=1, explain=False)) == 40
