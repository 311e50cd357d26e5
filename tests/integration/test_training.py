"""From data to an answer, by the commands that a person gives."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.long, pytest.mark.server]
SMALL = ["--batch-size", "128", "--rate", "0.1"]  # 24 steps teach so little that the full batch would teach nothing


def test_short_training_by_the_released_recipe_is_registered_packed_and_served(make_stack, tmp_path):
    stack = make_stack(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    for command in (
        ["train", "--config", f"{ROOT}/training/released.toml", "--subset", "2000", "--epochs", "2", *SMALL],
        ["package", "models:/cifar10@challenger", "--version", "0.9.0", "--keep", f"{tmp_path}/package"],
    ):
        done = stack.command(*command)
        assert done.returncode == 0, done.stderr
    stack.start(tmp_path / "package")
    stack.wait_until_ready()
    image = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
    answer = httpx.post(f"{stack.gateway}/predict", content=image, headers={"content-type": "image/png"}).json()
    assert answer["model"] == {"name": "cifar10", "version": "0.9.0"}


def test_the_readmes_path_with_ones_own_images_works_as_it_is_written(tmp_path, until):
    """Train, evaluate, serve, and a second version in and out, in a folder that looks like the clone."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.split("## Your own images", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```console\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in text.splitlines()]
    assert [command[1] for command in commands if command[0] == ".venv/bin/gradserve"][:3] == [
        "train", "evaluate", "serve"
    ]  # fmt: skip
    for name in ("cat", "horse", "ship"):
        shutil.copytree(ROOT / "tests" / "samples" / name, tmp_path / "photos" / name)
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "released").symlink_to(ROOT / "model_store" / "released")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    foreign = ("AGENT_", "GATEWAY_", "GRADSERVE_", "MLFLOW")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    said = tmp_path / "serve.log"
    serving: list[subprocess.Popen] = []
    try:
        for command in commands:
            if command[0] == "export":
                environment |= [command[1].split("=", 1)]
            elif command[1] == "serve":
                with said.open("wb") as output:
                    started = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
                serving.append(started)
                until(lambda: "ready:" in said.read_text() or serving[0].poll() is not None, 240)
                assert "ready:" in said.read_text(), said.read_text()
            else:
                done = subprocess.run(
                    command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
                )
                assert done.returncode == 0, (command, done.stdout, done.stderr)
                assert " INFO mlflow" not in done.stderr
        address = re.search("ready: (.*)", said.read_text())[1]
        image = (ROOT / "tests" / "samples" / "ship" / "0.png").read_bytes()
        answer = httpx.post(f"{address}/predict", content=image, headers={"content-type": "image/png"}).json()
        assert answer["model"] == {"name": "photos", "version": "1.0.1"}
        assert answer["class"] in {"cat", "horse", "ship"}
    finally:
        for process in serving:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert not (tmp_path / "results").exists()
