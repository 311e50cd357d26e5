"""The measurement of training on a GPU runs on a processor too, where steps are never recorded."""

import json

import pytest

from benchmarks.gpu import speed


@pytest.mark.long
def test_report_has_the_speed_of_each_way_and_the_losses(tmp_path, monkeypatch):
    all_settings = speed.settings
    # torch.compile needs a compiler, and minutes.
    monkeypatch.setattr(speed, "settings", lambda: [one for one in all_settings() if one[0] != speed.COMPILED])
    monkeypatch.setattr(speed, "SIDES", (8, 12))
    monkeypatch.setattr(speed, "BATCHES", (16,))
    monkeypatch.setattr("sys.argv", ["speed.py", "--images", "64", "--rounds", "1", "--output", str(tmp_path / "r")])
    speed.main()
    report = json.loads((tmp_path / "r").read_text())
    assert report["losses"]["plain"] == report["losses"]["recorded"]
    assert set(report["images_per_s"]["plain"]["16"]) == {"8", "12", "12, sharpness-aware"}
    assert report["images_per_s"]["one nccl process"]["16"]["12"] > 0
