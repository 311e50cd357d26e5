"""Several models in one real stack: each has its own versions, and what happens to one does not touch the others."""

import base64
import json

import httpx
import pytest

from training.package.export import package_directory

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def image(model_source):
    return base64.b64decode(json.loads((model_source / "reference.json").read_text())["images"][0])


@pytest.fixture(scope="module")
def pack_other(write_untrained, tmp_path_factory):
    """`pack_other(name, version)`: the archive of another model, outside the model store."""

    def pack(name, version):
        source = write_untrained(version, seed=3, classes=("left", "right"), name=name)
        return str(package_directory(source, tmp_path_factory.mktemp("other")))

    return pack


def asked(stack, image, **params):
    return httpx.post(f"{stack.gateway}/predict", params=params, content=image, timeout=30)


def answer(stack, image, **params):
    response = asked(stack, image, **params)
    assert response.status_code == 200, response.text
    return response.json()


def versions(stack, image):
    """The version that answers a call to the second model; none if it gets no answer."""
    response = asked(stack, image, model="hands")
    return {response.json()["model"]["version"]} if response.status_code == 200 else set()


def command(stack, *arguments):
    done = stack.command(*arguments)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.long
def test_a_second_model_is_added_moved_unloaded_and_removed_while_the_first_serves(stack, image, pack_other, until):
    first = answer(stack, image)["model"]
    before = stack.plan()
    assert "callers name it by model=hands" in command(
        stack, "deploy", pack_other("hands", "1.0.0"), "--model", "hands"
    )
    try:
        until(lambda: asked(stack, image, model="hands").status_code == 200, 10)  # the gateway follows within a second
        added = answer(stack, image, model="hands")
        assert added["model"] == {"name": "hands", "version": "1.0.0"}
        assert added["class"] in {"left", "right"}
        assert answer(stack, image)["model"] == first, "calls that name no model keep theirs"

        command(stack, "deploy", pack_other("hands", "1.1.0"), "--model", "hands", "--canary", "100")
        until(lambda: versions(stack, image) == {"1.1.0"}, 10)
        command(stack, "promote", "--model", "hands")
        command(stack, "rollback", "--model", "hands")
        until(lambda: versions(stack, image) == {"1.0.0"}, 10)
        assert {**stack.plan(), "revision": 0} == {**before, "revision": 0}, "the first model's plan is as it was"

        command(stack, "scale", "1.0.0", "0", "--model", "hands")
        asleep = asked(stack, image, model="hands")
        assert (asleep.status_code, asleep.json()["code"]) == (503, "not_ready")
        assert stack.health().json()["status"] == "ok", "a model that is kept unloaded is no fault"
        command(stack, "scale", "1.0.0", "1", "--model", "hands")
        until(lambda: versions(stack, image) == {"1.0.0"}, 10)
    finally:
        command(stack, "models", "remove", "hands")
    until(lambda: asked(stack, image, model="hands").status_code == 404, 10)
    gone = asked(stack, image, model="hands")
    assert (gone.status_code, gone.json()["code"]) == (404, "model_unknown")
    assert answer(stack, image)["model"] == first


def test_a_new_model_that_cannot_be_verified_leaves_the_plan_as_it_was(stack, image, pack_other, tmp_path):
    before = stack.plan()
    broken = tmp_path / "feet-1.0.0.mar"
    broken.write_bytes(b"no archive")
    refused = stack.command("deploy", str(broken), "--model", "feet")
    assert refused.returncode == 1
    assert "feet-1.0.0.mar" in refused.stderr
    assert stack.plan() == before
    assert "default" in command(stack, "models", "list")
