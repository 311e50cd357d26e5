"""`gradserve score` on Ray: on this machine, and on two nodes in network namespaces of which one is killed.

`make test-bulk` installs Ray and runs these. They take minutes; the namespaces need root and iproute2.
"""

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from pyarrow import dataset

from benchmarks.serving.ray_nodes import ADDRESS, BIN, WITHOUT, kill, two_nodes
from control.images.archive_source import ArchiveSource
from handlers.build import write_build

pytestmark = pytest.mark.bulk

ROUNDS = 40  # of the 100 samples
# Scores photos with an archive whose handler ends its process at some images; argv: archive, photos, output, the form.
SCORE_PHOTOS = """
import os, signal, sys
from control.bulk.on_ray import score_shards
from control.bulk.output import Form
from control.bulk.plan import Asked, make_plan
from control.archive import inspect_archive
from pathlib import Path

class EndsProcess(Form):
    def table(self, batch, entries):
        if "050.png" in batch.files:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().table(batch, entries)

if __name__ == "__main__":
    good, archive, photos, output, form = sys.argv[1:]
    plan = make_plan(Asked(photos, output, file_rows=16), inspect_archive(Path(good)))
    job = plan.job._replace(form=EndsProcess(*plan.job.form)) if form == "ends" else plan.job
    for counts in score_shards(Path(archive).read_bytes(), job, plan.shards, workers=2):
        print(*counts)
"""
# Code that is added to the handler of an archive.
ENDS_AT_SOME_IMAGES = """

def _handle(self, data, context, handle=ImageHandler.handle):
    if b"end the process" in data[0]["body"]:
        os.kill(os.getpid(), 11)
    return handle(self, data, context)

ImageHandler.handle = _handle
"""


@pytest.fixture(scope="module")
def table(samples, write_parquet, tmp_path_factory):
    """The samples 40 times over, with a broken image in the middle, as one Parquet file."""
    images = [path.read_bytes() for path in samples] * ROUNDS
    images[2000] = b"no image"
    return write_parquet(tmp_path_factory.mktemp("table") / "images.parquet", images, group=100)


@pytest.fixture(scope="module")
def expected(samples, released):
    """Class and confidence of each sample by this installation's code, in one process."""
    with closing(ArchiveSource(released.path)) as source:
        return [(one.class_name, one.confidence) for one in source.predict([p.read_bytes() for p in samples], 1)]


@pytest.fixture
def run():
    """`run(command)`: a process with its own group, which is killed at the end."""
    with ExitStack() as started:

        def run(command):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WITHOUT)}
            process = subprocess.Popen(
                list(map(str, command)),
                env=environment,
                start_new_session=True,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            started.enter_context(process)  # closes its pipes
            started.callback(kill, process)
            return process

        yield run


def score(table, output, archive, *options):
    return (BIN / "gradserve", "score", table, output, "--archive", archive, "--file-rows", "200", *options)


def wait_for_files(output, count, process, within_s=240):
    """Return when the output has `count` files."""
    end = time.monotonic() + within_s
    while len(list(output.glob("*.parquet"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def check(output, expected):
    """Check that every image has one row, with the answer of one process, and only the broken one an error."""
    rows = dataset.dataset(output).to_table().sort_by("row").to_pylist()
    assert [row["row"] for row in rows] == list(range(len(expected) * ROUNDS))
    assert [row["row"] for row in rows if row["error"]] == [2000]
    assert rows[2000]["error"]["code"] == "image_unreadable"
    for row in rows:
        if row["error"] is None:
            class_name, confidence = expected[row["row"] % len(expected)]
            assert row["class"] == class_name
            assert row["confidence"] == pytest.approx(confidence, abs=0.002)
    assert not list(output.glob(".*"))


def test_a_run_that_is_killed_goes_on_where_it_was(run, table, expected, released_archive, tmp_path):
    output = tmp_path / "out"
    command = score(table, output, released_archive, "--workers", "2")
    first = run(command)
    wait_for_files(output, 3, first)
    kill(first)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 3 <= len(kept) < 20
    second = run(command)
    said, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    # The actors may have written another file after their command was killed.
    done, rest = (int(line.split()[0].replace(",", "")) for line in said.splitlines())
    assert done >= 200 * len(kept)
    assert done + rest == 4000
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}.items()
    check(output, expected)


def test_a_node_that_is_killed_loses_no_image(run, table, expected, released_archive, tmp_path):
    output = tmp_path / "out"
    with two_nodes() as nodes:
        scoring = run((*nodes.inside, *score(table, output, released_archive, "--address", ADDRESS)))
        wait_for_files(output, 4, scoring)
        nodes.kill_second()
        said, errors = scoring.communicate(timeout=300)
    assert scoring.returncode == 0, errors
    assert "4,000 images in " in said
    check(output, expected)


def test_a_shard_that_cannot_be_answered_ends_the_run_with_a_sentence(run, table, released_archive, tmp_path):
    broken = shutil.copy(table, tmp_path / "images.parquet")
    with Path(broken).open("r+b") as file:
        file.seek(2000)
        file.write(bytes(100_000))
    done = run(score(broken, tmp_path / "out", released_archive, "--workers", "1"))
    said, errors = done.communicate(timeout=240)
    assert done.returncode == 1, said
    assert "What is written is kept: run the command again for the rest" in errors.splitlines()[-1]


def add_code(archive, folder, code):
    """Return a copy of the archive with `code` at the end of its handler, packed as it was."""
    shutil.unpack_archive(archive, folder, "zip")
    with (folder / "image_handler.py").open("a") as handler:
        handler.write(code)
    write_build(folder)
    return shutil.make_archive(folder, "zip", folder)


@pytest.fixture
def photos(samples, tmp_path):
    """The samples; 33.png and 34.png end the process of that archive."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, path in enumerate(samples):
        more = b"end the process" if number in {33, 34} else b""
        (folder / f"{number:03}.png").write_bytes(path.read_bytes() + more)
    return folder


def score_photos(run, released, archive, photos, output, form="plain"):
    done = run((BIN / "python", "-c", SCORE_PHOTOS, released, archive, photos, output, form))
    said, errors = done.communicate(timeout=240)
    return done.returncode, said, errors


def test_an_image_that_ends_its_process_gets_an_error_and_all_others_an_answer(
    run, released_archive, photos, expected, tmp_path
):
    output = tmp_path / "out"
    ends = add_code(released_archive, tmp_path / "ends", ENDS_AT_SOME_IMAGES)
    code, said, errors = score_photos(run, released_archive, ends, photos, output)
    assert code == 0, errors
    counts = Counter(line for line in said.splitlines() if re.fullmatch(r"\d+ \d+", line))  # Ray prints too
    assert counts == {"16 0": 5, "16 2": 1, "4 0": 1}
    rows = dataset.dataset(output).to_table().sort_by("file").to_pylist()
    assert [row["file"] for row in rows] == [f"{number:03}.png" for number in range(100)]
    failed = [row for row in rows if row["error"]]
    assert [row["file"] for row in failed] == ["033.png", "034.png"]
    assert failed[0]["error"] == {
        "code": "process_ended",
        "detail": "the process ended at this image, 2 times of 2",
    }
    for row, (class_name, confidence) in zip(rows, expected, strict=True):
        if row["error"] is None:
            assert row["class"] == class_name
            assert row["confidence"] == pytest.approx(confidence, abs=0.002)


def test_a_shard_that_ends_every_process_is_given_up_after_all_others_are_answered(
    run, released_archive, photos, tmp_path
):
    output = tmp_path / "out"
    code, _, errors = score_photos(run, released_archive, released_archive, photos, output, "ends")
    assert code == 1
    named = "3 processes ended at each of these, and all other images are answered: 048.png to 063.png (16 images). "
    assert named + "What is written is kept: run the command again for the rest" in errors
    assert dataset.dataset(output).count_rows() == 84


def test_a_model_whose_process_ends_while_it_loads_is_tried_three_times(run, released_archive, photos, tmp_path):
    ends = add_code(released_archive, tmp_path / "ends", "\nos.kill(os.getpid(), 11)\n")
    code, _, errors = score_photos(run, released_archive, ends, photos, tmp_path / "out")
    assert code == 1
    assert "3 processes in a row ended while they loaded the model" in errors
