"""The gateway agrees with its OpenAPI document for generated requests: Schemathesis with all its checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from gateway.auth.keys import make_key

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = Path(__file__).with_name("schemathesis.toml")
SECRET, KEY = make_key("schemathesis", ("predict", "explain", "read"))


@pytest.fixture(scope="module", params=[pytest.param("without keys", marks=pytest.mark.long), "with keys"])
def gateway(start_gateway: Callable[..., tuple[str, int]], request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """Return the address of a gateway, and the options that carry the caller's key."""
    keys = {"KEYS": f"{KEY.name}:{KEY.sha256}:{'+'.join(KEY.scopes)}"} if request.param == "with keys" else {}
    base, _ = start_gateway(WORKERS="1", LOG_LEVEL="warning", **keys)
    return base, ["--header", f"Authorization: Bearer {SECRET}"] if keys else []


def run(gateway: tuple[str, list[str]], folder: Path, *options: str, within_s: float) -> None:
    base, headers = gateway
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{base}/openapi.json"]
    done = subprocess.run(
        [*command, "--checks", "all", "--generation-database", "none", *headers, *options],
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": str(CONFIG.with_name("schemathesis_hooks.py"))},
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert httpx.get(f"{base}/readyz").status_code == 200


def test_a_few_hundred_requests_find_no_failure(gateway: tuple[str, list[str]], tmp_path: Path) -> None:
    run(gateway, tmp_path, "--max-examples", "6", "--seed", "1", "--phases", "examples,coverage,fuzzing", within_s=180)


@pytest.mark.long
def test_thousands_of_requests_find_no_failure(gateway: tuple[str, list[str]], tmp_path: Path) -> None:
    run(gateway, tmp_path, "--max-examples", "150", within_s=900)
