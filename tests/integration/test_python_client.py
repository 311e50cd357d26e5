"""The Python client and the terminal's commands against the real model behind the real gateway."""

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gradserve import AsyncClient, Client, Evidence, Failed, RegionTest, Unavailable

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "samples"
CAT, DOG = SAMPLES / "cat" / "0.png", SAMPLES / "dog" / "0.png"


@pytest.fixture
def client(stack):
    with Client(stack.gateway) as client:
        yield client


def test_evidence_is_about_the_class_that_was_asked_for(client):
    evidence = client.evidence(CAT, target="dog", coverage=0.95, test=True)
    assert (evidence.class_name, evidence.target.class_name) == ("cat", "dog")
    assert 0 <= evidence.target.confidence < evidence.confidence
    heat = evidence.heatmap.array()
    assert heat.shape == (32, 32)
    assert heat.max() == pytest.approx(1, abs=0.01)
    assert evidence.heatmap.image().size == (32, 32)
    assert isinstance(evidence.test, RegionTest)


def test_every_part_is_known_or_says_why_not(client):
    evidence = client.evidence(CAT, coverage=0.95)
    parts = (evidence.familiar, evidence.familiarity, evidence.similar, evidence.answer_set)
    reasons = [part.reason for part in parts if isinstance(part, Unavailable)]
    assert len(reasons) in (0, len(parts))
    if reasons:
        assert set(reasons) == {"this version was packed without evidence: pack it again with gradserve package"}
        return
    assert evidence.familiar is True
    assert "cat" in evidence.answer_set.class_names
    nearest = evidence.similar[0]
    assert nearest.class_name in {"cat", "dog"} or nearest.similarity > 0.5
    assert Image.open(io.BytesIO(client.example(nearest))).size == (32, 32)


def test_a_batch_of_explanations_has_an_error_for_a_file_that_is_no_image(client):
    cat, bad, dog = client.explain_batch([CAT, b"no image", DOG], heatmap=False)
    assert isinstance(cat, Evidence)
    assert (cat.class_name, dog.class_name, cat.heatmap) == ("cat", "dog", None)
    assert isinstance(bad, Failed)
    assert bad.code == "image_unreadable"


def test_many_images_are_answered_in_several_calls_in_order(client):
    paths = sorted(SAMPLES.rglob("*.png"))
    answers = client.predict_batch(paths)
    assert len({answer.request_id for answer in answers}) == 4
    assert sum(answer.class_name == path.parent.name for answer, path in zip(answers, paths, strict=True)) > 90


def test_the_async_client_answers_the_same(stack, client):
    async def ask():
        async with AsyncClient(stack.gateway) as other:
            return await asyncio.gather(other.predict(CAT), other.evidence(DOG, heatmap=False), other.explain(CAT))

    prediction, evidence, overlay = asyncio.run(ask())
    assert prediction.class_name == client.predict(CAT).class_name
    assert evidence.class_name == "dog"
    assert overlay.startswith(b"\x89PNG")


def test_the_terminal_explains_by_the_gateway(stack, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "control.cli.main", "explain", str(CAT), "--output", str(tmp_path), "--test", "--json"],
        env={**os.environ, "GRADSERVE_URL": stack.gateway},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["class"] == "cat"
    assert Image.open(io.BytesIO(Path(found["overlay"]).read_bytes())).size == (32, 32)
    assert "verdict" in found["test"]
