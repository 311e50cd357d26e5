"""From the released model's recipe to an answer, by the commands that a person gives."""

from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.long, pytest.mark.server]


def test_short_training_by_the_released_recipe_is_registered_packed_and_served(make_stack, tmp_path):
    stack = make_stack(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    for command in (
        ["train", "--config", f"{ROOT}/training/released.toml", "--subset", "2000", "--epochs", "2"],
        ["package", "models:/cifar10@challenger", "--version", "0.9.0", "--keep", f"{tmp_path}/package"],
    ):
        done = stack.command(*command)
        assert done.returncode == 0, done.stderr
    stack.start(tmp_path / "package")
    stack.wait_until_ready()
    image = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
    answer = httpx.post(f"{stack.gateway}/predict", content=image, headers={"content-type": "image/png"}).json()
    assert answer["model"] == {"name": "cifar10", "version": "0.9.0"}
