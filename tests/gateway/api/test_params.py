"""Query parameters and headers of a call: what is impossible is refused before the body is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

IMAGE = b"image-of-dog"


@pytest.mark.parametrize(
    "route",
    [
        "/predict?top_k=0",
        "/predict?top_k=-1",
        "/predict?top_k=x",
        "/predict?top_k=1_0",
        "/predict?top_k=%D9%A1",
        "/predict?top_k=",
        "/predict?top_k=1&top_k=2",
        "/predict?topk=1",
        "/predict?version=..",
        "/predict?version=1/2",
        "/predict?version=",
        "/predict/batch?top_k=0",
        "/predict/batch?version=-",
        "/explain?target=",
        "/explain?method=" + "x" * 201,
        "/explain?alpha=1.1",
        "/explain?alpha=nan",
        "/explain?alpha=x",
        "/explain?size=0",
        "/explain?size=1025",
        "/explain?top_k=1",
        "/explain?coverage=0.49",
        "/explain?coverage=1",
        "/explain?coverage=nan",
        "/explain?test=yes",
        "/explain?similar=11",
        "/explain?similar=-1",
        "/explain?heatmap=png",
        "/explain/batch?alpha=0.5",
        "/explain?version=%00",
        "/v2/models/cifar10/versions/-/infer",
    ],
)
def test_a_bad_parameter_is_400(stand: Stand, route: str, assert_problem: Callable[..., None]) -> None:
    assert_problem(stand.client.post(route, content=IMAGE), 400, "bad_parameter")
    assert not stand.torchserve.calls


@pytest.mark.parametrize("timeout_ms", ["0", "-1", "x", "1.5"])
def test_a_bad_timeout_is_400(stand: Stand, timeout_ms: str, assert_problem: Callable[..., None]) -> None:
    answer = stand.client.post("/predict", content=IMAGE, headers={"x-timeout-ms": timeout_ms})
    assert_problem(answer, 400, "bad_parameter")
