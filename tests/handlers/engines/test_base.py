from __future__ import annotations

import numpy as np
import pytest
import torch

from handlers.engines import MAX_BATCH, Outputs, predict_all, run_all, softmax, thread_count


def test_softmax_is_torchs_at_the_temperature():
    logits = np.random.default_rng(0).normal(0, 30, (5, 10)).astype(np.float32)
    expected = torch.softmax(torch.from_numpy(logits) / 1.7, dim=1)
    np.testing.assert_allclose(softmax(logits, 1.7), expected, atol=1e-6)


def test_softmax_survives_huge_logits():
    assert softmax(np.array([[1e30, -1e30]], dtype=np.float32), 1.0).tolist() == [[1.0, 0.0]]


def test_many_images_are_split_into_forwards_and_stay_in_order():
    class Counting:
        """Tells each image by its first value and remembers how long its batches were."""

        lengths: list[int] = []  # noqa: RUF012

        def run(self, batch):
            self.lengths.append(len(batch))
            return Outputs(batch[:, 0, 0, :1], batch[:, 0, 0])

    many = np.zeros((2 * MAX_BATCH + 1, 3, 1, 1), dtype=np.float32)
    many[:, 0, 0, 0] = np.arange(len(many))
    assert predict_all(Counting(), many)[:, 0].tolist() == list(range(len(many)))
    assert Counting.lengths == [MAX_BATCH, MAX_BATCH, 1]
    outputs = run_all(Counting(), many)
    assert outputs.features[:, 0].tolist() == list(range(len(many)))
    assert outputs.maps is None


def test_taken_outputs_are_those_of_the_images_in_the_order_asked_for():
    column = np.arange(4, dtype=np.float32)[:, None]
    taken = Outputs(column, column + 10, sharpness=column + 20).take([3, 1])
    assert taken.probabilities.tolist() == [[3], [1]]
    assert taken.features.tolist() == [[13], [11]]
    assert taken.maps is None
    assert taken.sharpness.tolist() == [[23], [21]]


@pytest.mark.parametrize(("setting", "threads"), [("3", 3), ("", 1), (None, 1)])
def test_an_engine_has_as_many_threads_as_the_agent_gives_its_worker(setting, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert thread_count() == threads
