"""Errors name the answer of another server, a proxy's page, and the package that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradserve import AnswerUnreadable, GatewayProblem

ROOT = Path(__file__).parents[2]


def test_an_html_page_of_a_proxy_raises_a_gateway_problem(asking) -> None:
    with pytest.raises(GatewayProblem, match="502 unknown"):
        asking(lambda _: httpx.Response(502, text="<html>"))("predict", b"x")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("predict", {"text": "<html>"}),
        ("predict", {"json": {"class": "cat"}}),
        ("evidence", {"json": []}),
        ("explain", {"text": "<html>"}),
        ("models", {"json": []}),
    ],
)
def test_an_answer_of_another_server_is_named(asking, method: str, answer: dict[str, Any]) -> None:
    arguments = () if method == "models" else (b"x",)
    with pytest.raises(AnswerUnreadable, match="check the address"):
        asking(lambda _: httpx.Response(200, **answer))(method, *arguments)


def test_package_needs_neither_numpy_nor_pillow_nor_the_rest_of_this_repository() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'PIL', 'contracts', 'gateway', 'control', 'pydantic'): sys.modules[name] = None\n"
        "from gradserve import Heatmap, MissingPackage\n"
        "for method in ('array', 'image'):\n"
        "    try: getattr(Heatmap(1, 1, (1.0,)), method)()\n"
        "    except MissingPackage as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install numpy" in done.stdout
    assert "pip install pillow" in done.stdout
