"""Images scored in bulk, and the same images asked of the running service."""

from pathlib import Path

import pytest
from pyarrow import dataset

from control.archive import inspect_archive
from control.bulk.plan import Asked, make_plan
from gradserve import Client

pytestmark = pytest.mark.server

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
# INT8 and the order of float32 sums depend on the length of a batch.
SAME = 0.002


def test_answers_in_bulk_are_those_of_the_service(stack, score_without_ray, tmp_path):
    archive = inspect_archive(stack.model_store / stack.plan()["stable"]["archive"])
    plan = make_plan(Asked(str(SAMPLES), str(tmp_path / "out"), evidence=True), archive)
    score_without_ray(archive.path, plan)
    rows = dataset.dataset(tmp_path / "out").to_table().sort_by("file").to_pylist()
    images = [SAMPLES / row["file"] for row in rows]
    with Client(stack.gateway) as client:
        predictions, explanations = client.predict_batch(images), client.explain_batch(images)
    for row, answer, evidence in zip(rows, predictions, explanations, strict=True):
        assert row["class"] == answer.class_name == evidence.class_name
        assert row["confidence"] == pytest.approx(answer.confidence, abs=SAME)
        assert (row["familiar"], row["method"]) == (answer.familiar, evidence.method)
        assert row["familiarity"] == pytest.approx(evidence.familiarity, abs=0.02)
        heat = [value / 255 for value in row["heatmap"]["values"]]
        worst = max(abs(a - b) for a, b in zip(heat, evidence.heatmap.values, strict=True))
        assert worst < 0.1
