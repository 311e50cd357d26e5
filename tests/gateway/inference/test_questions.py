"""Questions about an image: refused if the version cannot answer them, and sent on its wire to the right workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contracts import wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

IMAGE = b"image-of-dog"


def test_an_unknown_target_is_400_with_the_handlers_facts(stand: Stand, assert_problem: Callable[..., None]) -> None:
    answer = stand.client.post("/explain?target=unicorn", content=IMAGE)
    assert_problem(answer, 400, "unknown_target")
    assert answer.json()["classes"] == ["cat", "dog", "frog"]


@pytest.mark.parametrize(("query", "code"), [("target=unicorn", "unknown_target"), ("method=guess", "unknown_method")])
def test_an_unknown_class_or_method_is_refused_before_an_image_is_sent(
    evidence_stand: Stand, query: str, code: str
) -> None:
    refused = evidence_stand.client.post(f"/explain?{query}", content=IMAGE)
    assert (refused.status_code, refused.json()["code"]) == (400, code)
    assert not evidence_stand.torchserve.calls


def test_a_method_with_a_backward_pass_goes_to_the_explain_entry(evidence_stand: Stand) -> None:
    document = evidence_stand.explain("?method=gradcam")
    path, options = evidence_stand.torchserve.asked()
    assert (path, document["method"]) == ("/explanations/cifar10-explain/1.0.0", "gradcam")
    assert options.images == (wire.ImageOptions(explain=True, method="gradcam"),)
