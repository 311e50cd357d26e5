"""The whole course of a release at 50 requests a second: the long form of tests/integration/test_releases.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.server
def test_no_caller_notices_the_course_of_a_release(tmp_path):
    output = tmp_path / "releases.json"
    command = [sys.executable, "benchmarks/releases.py", "--runs", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))["each"][0]
    assert report["requests"] > 4000
    assert (report["failed"], report["outside_the_plan"], report["canary"]["changed_sides"]) == ({}, 0, 0)
    fewest, most = report["canary"]["callers_expected"]
    assert fewest <= report["canary"]["callers"] <= most
