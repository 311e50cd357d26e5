"""The clients of docs/how-to/call.md against the real model: real images, real answers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "samples"
DOCS = (ROOT / "docs" / "how-to" / "call.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", ["from gradserve", "tritonclient"])
def test_python_example_gives_a_class_of_the_model(stack, tmp_path, mark):
    (example,) = [code for code in re.findall(r"(?ms)^```python\n(.*?)^```", DOCS) if mark in code]
    shutil.copy(SAMPLES / "cat" / "0.png", tmp_path / "cat.png")
    done = subprocess.run(
        [sys.executable, "-c", example.replace("localhost:8000", stack.gateway.removeprefix("http://"))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (version,) = [version for version in stack.versions() if version["role"] == "stable"]
    assert any(name in done.stdout for name in version["contract"]["classes"]), done.stdout
