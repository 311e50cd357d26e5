"""`gradserve score` on Ray: on this machine, and on two nodes in network namespaces of which one is killed.

`make test-bulk` installs Ray and runs these. They take minutes; the namespaces need root and iproute2.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from pyarrow import dataset

from control.images.archive_source import ArchiveSource

pytestmark = pytest.mark.bulk

BIN = Path(sys.executable).parent
HEAD, WORKER = "10.199.77.1", "10.199.77.2"
PORT = 6399
STORE_BYTES = 200_000_000
ROUNDS = 40  # of the 100 samples


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
    """`run(*command, inside=NAMESPACE)`: a process with its own group, which is killed at the end."""
    with ExitStack() as started:

        def run(*command, inside=None, **options):
            prefix = ["ip", "netns", "exec", inside] if inside else []
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
            process = subprocess.Popen(
                [*prefix, *map(str, command)], env=environment, start_new_session=True, text=True, **options
            )
            started.callback(kill, process)
            return process

        yield run


def kill(process):
    """Kill the process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def nodes(run):
    """Two network namespaces with a Ray node of one core each: their names, and the second one's process."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.fail("two nodes need network namespaces: run as root, with iproute2 installed")
    names = [f"gradserve-{os.getpid()}-{end}" for end in ("a", "b")]
    links = [f"gs{os.getpid()}{end}" for end in ("a", "b")]
    with ExitStack() as made:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            made.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        subprocess.run(["ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1]], check=True)
        for name, link, address in zip(names, links, (HEAD, WORKER), strict=True):
            subprocess.run(["ip", "link", "set", link, "netns", name], check=True)
            for change in (f"addr add {address}/24 dev {link}", f"link set {link} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *change.split()], check=True)
        start = [BIN / "ray", "start", "--block", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
        start.append("--disable-usage-stats")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        head = [f"--node-ip-address={HEAD}", "--head", f"--port={PORT}", "--include-dashboard=false"]
        run(*start, *head, inside=names[0], **quiet)
        wait_for_nodes(names[0], 1)
        worker = run(*start, f"--node-ip-address={WORKER}", f"--address={HEAD}:{PORT}", inside=names[1], **quiet)
        wait_for_nodes(names[0], 2)
        yield names[0], worker


def wait_for_nodes(namespace, count, within_s=120):
    """Return when the cluster has `count` nodes."""
    script = f"import ray; ray.init('{HEAD}:{PORT}', log_to_driver=False); print(len(ray.nodes()))"
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", script]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.stdout.strip().endswith(str(count)):
            return
        time.sleep(1)
    pytest.fail(f"Ray has no {count} nodes after {within_s} s: {said.stdout}{said.stderr}")


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
    first = run(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_files(output, 3, first)
    kill(first)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 3 <= len(kept) < 20
    second = run(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    # The actors may have written another file after their command was killed.
    done, rest = (int(line.split()[0].replace(",", "")) for line in said.splitlines())
    assert done >= 200 * len(kept)
    assert done + rest == 4000
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}.items()
    check(output, expected)


def test_a_node_that_is_killed_loses_no_image(nodes, run, table, expected, released_archive, tmp_path):
    head, worker = nodes
    output = tmp_path / "out"
    command = score(table, output, released_archive, "--address", f"{HEAD}:{PORT}")
    scoring = run(*command, inside=head, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_files(output, 4, scoring)
    kill(worker)
    said, errors = scoring.communicate(timeout=300)
    assert scoring.returncode == 0, errors
    assert "4,000 images in " in said
    check(output, expected)


def test_a_shard_that_cannot_be_answered_ends_the_run_with_a_sentence(run, table, released_archive, tmp_path):
    broken = shutil.copy(table, tmp_path / "images.parquet")
    with Path(broken).open("r+b") as file:
        file.seek(2000)
        file.write(bytes(100_000))
    done = run(*score(broken, tmp_path / "out", released_archive, "--workers", "1"), stdout=-1, stderr=-1)
    said, errors = done.communicate(timeout=240)
    assert done.returncode == 1, said
    assert "What is written is kept: run the command again for the rest" in errors.splitlines()[-1]
