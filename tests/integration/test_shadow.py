"""A shadow on the real stack: its answers reach nobody, and the metrics say what comparing them by hand says."""

import base64
import json
import re

import httpx
import pytest

from training.package.export import package_directory

pytestmark = [pytest.mark.server, pytest.mark.long]
SHADOW = "9.5.0"


@pytest.fixture
def shadow(stack, write_untrained, tmp_path):
    """An untrained version as the shadow; it is out again afterwards."""
    archive = package_directory(write_untrained(SHADOW, seed=95), tmp_path)
    deployed = stack.command("deploy", str(archive), "--shadow")
    assert deployed.returncode == 0, deployed.stderr
    yield SHADOW
    retired = stack.command("retire", SHADOW)
    assert retired.returncode == 0, retired.stderr


@pytest.fixture
def gateway(stack):
    with httpx.Client(base_url=stack.gateway, timeout=30) as client:
        yield client


def counted(gateway) -> dict[str, float]:
    """The gateway's `gateway_shadow_*` counters of the shadow, by the one label that varies."""
    lines = gateway.get("/metrics").text.splitlines()
    return {
        re.findall(r'(?:outcome|direction)="(\w+)"', line)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(("gateway_shadow_images_total{", "gateway_shadow_shift_total{"))
        and f'version="{SHADOW}"' in line
    }


def test_mirrored_calls_are_compared_as_by_hand_and_callers_get_the_stable_version(
    stack, shadow, gateway, model_source, until
):
    images = [base64.b64decode(image) for image in json.loads((model_source / "reference.json").read_text())["images"]]
    stable = stack.plan()["stable"]["version"]

    def mirrored(count: int) -> bool:
        told = counted(gateway)
        assert not told.get("failed")
        return told.get("agree", 0) + told.get("disagree", 0) + told.get("dropped", 0) == count

    def followed() -> bool:
        status = stack.status()
        return {process["revision"] for process in status["gateways"]} == {status["plan_revision"]}

    until(followed, 10)
    agree, shift = 0, 0.0
    for number, image in enumerate(images):
        answer = gateway.post("/predict?top_k=10", content=image).json()
        assert answer["model"]["version"] == stable
        until(lambda number=number: mirrored(number + 1), 20)
        other = gateway.post(f"/predict?top_k=10&version={shadow}", content=image).json()
        assert other["model"]["version"] == shadow
        agree += other["class"] == answer["class"]
        confidences = {entry["class"]: entry["confidence"] for entry in other["top"]}
        shift += confidences[answer["class"]] - answer["confidence"]
    told = counted(gateway)
    assert told.get("dropped", 0) == 0, "one call at a time leaves room"
    assert (told.get("agree", 0), told.get("disagree", 0)) == (agree, len(images) - agree)
    assert told.get("up", 0) - told.get("down", 0) == pytest.approx(shift, abs=0.05)

    files = [("file", ("x.png", image, "image/png")) for image in images]
    results = gateway.post("/predict/batch", files=files).json()
    assert results["model"]["version"] == stable
    until(lambda: mirrored(2 * len(images)), 20)
