import os

import pytest

from control.agent.cores import cgroup_quota, usable_cores


def test_quota_of_cgroup_two_is_read(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(tmp_path) == pytest.approx(1.5)


def test_quota_of_cgroup_one_is_read(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == pytest.approx(2.0)


@pytest.mark.parametrize("content", ["max 100000", "", "nonsense", "100000 0"])
def test_a_missing_or_unreadable_limit_is_none(tmp_path, content):
    (tmp_path / "cpu.max").write_text(content)
    assert cgroup_quota(tmp_path) is None


def test_a_quota_below_one_core_still_gives_one(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1


def test_without_a_quota_the_affinity_mask_gives_the_cores(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
