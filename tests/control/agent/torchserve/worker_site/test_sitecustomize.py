"""Torch in a TorchServe worker, which finds sitecustomize.py by its PYTHONPATH."""

import os
import subprocess
import sys

import pytest

from control.agent.torchserve.process import worker_environment
from control.agent.torchserve.run_folder import RunFolder


@pytest.mark.parametrize(("code", "loads"), [("pass", False), ("torch.Tensor", True), ("import torch.nn", True)])
def test_workers_load_torch_only_when_they_use_it(tmp_path, code, loads):
    with RunFolder(tmp_path) as folder:
        environment = worker_environment(dict(os.environ), folder, threads=1)
    said = subprocess.run(
        [sys.executable, "-c", f"import sys, torch; {code}; print('torch._C' in sys.modules)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"{loads}\n"
