from __future__ import annotations

import json
from datetime import UTC, datetime

from training.evaluate.test_set_log import record_look


def test_each_look_adds_a_line_and_changes_none(tmp_path):
    log = tmp_path / "new folder" / "looks.jsonl"
    record_look(log, "release", model="cifar10", accuracy=0.966)
    first = log.read_text(encoding="utf-8")
    record_look(log, "card", images=10_000)
    assert log.read_text(encoding="utf-8").startswith(first)
    one, two = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert (one["purpose"], one["model"], one["accuracy"]) == ("release", "cifar10", 0.966)
    assert (two["purpose"], two["images"]) == ("card", 10_000)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(one["at"])).total_seconds()) < 60
