"""Router on trial on the real stack: at the gate, as canaries and shadows that are judged, from MLflow's registry."""

import hashlib
import json
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient

from benchmarks.serving.load import Address, open_loop
from training.package.export import package_directory
from training.tracking.releases import find_release, log_release

pytestmark = pytest.mark.server
SAMPLES = Path(__file__).parents[1] / "samples"
RATE = 60
# A trial of seconds: in life it takes minutes.
AUTO = ("promote", "--auto", "--window", "9", "--requests", "150")
ROLLED_BACK, NO_VERDICT = 3, 4


@contextmanager
def load(stack):
    """Steady requests through the gateway while the block runs; yields the statuses."""
    images = [path.read_bytes() for path in sorted(SAMPLES.glob("*/*.png"))]
    head = "POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {}\r\n\r\n"
    requests = [head.format(len(image)).encode() + image for image in images]
    statuses, stop = [], threading.Event()

    def note(number, due, answered, status, answer):
        statuses.append(status)

    thread = threading.Thread(
        target=open_loop,
        args=(Address(int(stack.gateway.rpartition(":")[2]), requests), RATE, 600.0),
        kwargs={"each": note, "stop": stop},
    )
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()


def done(answer, code=0):
    assert answer.returncode == code, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stdout


@pytest.mark.long
def test_the_gate_refuses_a_version_that_classifies_worse_and_says_by_how_much(
    stack, stable, write_untrained, tmp_path
):
    before = stack.plan()
    worse = package_directory(write_untrained("9.15.0", seed=5), stack.home.parent / "worse")
    images = shutil.copytree(SAMPLES, tmp_path / "samples")
    strays = {"notes.txt": b"buy milk", "empty.png": b"", "film.mp4": bytes(7_000_000)}
    for name, content in strays.items():
        (images / "cat" / name).write_bytes(content)
    said = stack.command("deploy", str(worse), "--canary", "10", "--gate", str(images))
    assert {name for name in strays if f"skipped {images / 'cat' / name}: not an image" in said.stdout} == set(strays)
    assert "refused at the gate: accuracy" in said.stderr
    assert "lower by more than 0.5 points" in said.stderr
    done(said, 1)
    assert {**stack.plan(), "revision": 0} == {**before, "revision": 0}
    assert "of 100 images" in stack.audit()[-1]["reason"]


def test_a_gate_with_folders_that_are_no_classes_is_refused_before_anything_is_loaded(stack, pack_again, tmp_path):
    (tmp_path / "unicorn").mkdir()
    (tmp_path / "unicorn" / "1.png").write_bytes(b"x")
    before = stack.plan()
    said = stack.command("deploy", str(pack_again("9.16.0")), "--gate", str(tmp_path))
    assert "unicorn: the new version has no class of this name" in said.stderr
    assert stack.plan() == before


@pytest.mark.long
def test_canaries_are_promoted_or_rolled_back_by_what_they_do(stack, stable, pack_again):
    with load(stack) as statuses:
        done(stack.command("deploy", str(pack_again("9.7.0")), "--canary", "50", "--gate", str(SAMPLES)))
        assert "500 are needed" in done(stack.command("promote", "--auto", "--window", "1"), NO_VERDICT)
        assert stack.plan()["canary"]["version"] == "9.7.0"
        assert "verdict on 9.7.0: promote" in done(stack.command(*AUTO, "--slower", "4"))
        assert stack.plan()["stable"]["version"] == "9.7.0"
    assert set(statuses) == {200}
    judged = next(line for line in reversed(stack.audit()) if line["what"] == "judged 9.7.0")
    assert [finding["about"] for finding in judged["verdict"]["findings"]] == ["errors", "times"]
    done(stack.command("rollback"))
    done(stack.command("retire", "9.7.0"))

    for version, trouble, told in (
        ("9.8.0", "if random.random() < 0.2: raise ValueError('trouble')", "failed "),
        ("9.9.0", "time.sleep(0.3 if random.random() < 0.2 else 0)", "took longer than"),
    ):
        with load(stack):
            done(stack.command("deploy", str(pack_again(version, trouble)), "--canary", "50"))
            said = done(stack.command(*AUTO), ROLLED_BACK)
        assert f"verdict on {version}: rollback" in said
        assert told in said
        plan = stack.plan()
        assert (plan["stable"]["version"], plan["canary"]) == (stable, None)
        assert told in stack.audit()[-1]["reason"]
        done(stack.command("retire", version))


@pytest.mark.long
def test_a_shadow_is_judged_by_how_often_it_names_another_class(stack, stable, pack_again, write_untrained):
    other = package_directory(write_untrained("9.10.0", seed=10), stack.home.parent / "other")
    for archive, code in ((pack_again("9.11.0"), 0), (other, ROLLED_BACK)):
        with load(stack) as statuses:
            done(stack.command("deploy", str(archive), "--shadow"))
            said = done(stack.command(*AUTO), code)
        assert set(statuses) == {200}
        assert "pairs, allowed 10.0%" in said
        if not code:
            done(stack.command("rollback"))
    counted = json.loads(stack.command("status", "--json").stdout)["counted"]["9.10.0"]
    assert counted["pairs"]["disagree"] > counted["pairs"]["agree"]
    assert counted["mean_shift"] < 0


@pytest.mark.long
def test_registered_versions_are_deployed_by_alias_and_the_aliases_follow_the_traffic(
    make_stack, model_source, pack_again, tmp_path
):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    stack = make_stack(MLFLOW_TRACKING_URI=store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        register_both(pack_again, tmp_path)
        stack.start(model_source)
        stack.wait_until_ready()
        first = stack.plan()["stable"]["version"]

        said = done(stack.command("deploy", "cifar10@challenger", "--stable"))
        assert "models:/cifar10/2 is 9.13.0" in said
        assert "models:/cifar10/2 is the champion" in said
        done(stack.command("deploy", "cifar10/1", "--stable"))
        assert find_release("cifar10", alias="champion").version == "9.12.0"
        assert find_release("cifar10", alias="previous").version == "9.13.0"
        tags = MlflowClient(store).get_model_version("cifar10", "1").tags
        assert str(stack.home) in tags["promoted_where"]
        done(stack.command("rollback"))
        assert find_release("cifar10", alias="champion").version == "9.13.0"

        client = MlflowClient(store)
        client.set_model_version_tag("cifar10", "1", "archive_sha256", "0" * 64)
        (stack.model_store / "cifar10-9.12.0.mar").unlink()
        done(stack.command("retire", "9.12.0"))
        said = stack.command("deploy", "cifar10/1")
        assert "its SHA-256 is" in said.stderr
        assert "MLflow" in stack.command("deploy", "cifar10@nobody").stderr
        assert "another model than cifar10: add --model dogs" in stack.command("deploy", "dogs@champion").stderr

        stack.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
        began = time.monotonic()
        said = done(stack.command("promote", first))
        assert time.monotonic() - began < 10
        assert "WARNING: MLflow's aliases were not moved" in said
        assert stack.plan()["stable"]["version"] == first
        assert stack.audit()[-1]["what"] == f"registry not updated for {first}"
        assert httpx.get(f"{stack.gateway}/readyz").status_code == 200


def register_both(pack_again, folder):
    """Registers 9.12.0 as models:/cifar10/1 and 9.13.0 as models:/cifar10/2, the challenger."""
    client = MlflowClient()
    run = client.create_run(client.create_experiment("releases", artifact_location=(folder / "artifacts").as_uri()))
    client.create_registered_model("cifar10")
    client.create_model_version("cifar10", run.info.artifact_uri, run.info.run_id)
    for version in ("9.12.0", "9.13.0"):
        archive = pack_again(version)
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        release = log_release("cifar10", version, run.info.run_id, archive, sha256, files=[], facts={})
    client.set_registered_model_alias("cifar10", "challenger", release.number)
