import subprocess
import sys

import pytest


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module", ["control.agent.agent", "control.cli.main", "control.cli.status", "control.release.plan_store"]
)
def test_control_imports_neither_torch_nor_mlflow_nor_training(module):
    loaded = loaded_after(f"import {module}")
    assert not {"torch", "mlflow", "training.train", "handlers.model", "ts"} & loaded


def test_the_agent_imports_nothing_of_the_gateways_web_framework():
    assert not {"fastapi", "httptools", "orjson", "gunicorn"} & loaded_after("import control.agent.agent")
