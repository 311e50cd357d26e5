"""Every documented answer has an example that fits its schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.api import schemas

if TYPE_CHECKING:
    from conftest import Stand


@pytest.fixture
def document(stand: Stand) -> dict[str, Any]:
    return dict(stand.client.get("/openapi.json").json())


def test_every_answer_in_json_has_an_example_that_fits_its_schema(document: dict[str, Any]) -> None:
    checked = set()
    for methods in document["paths"].values():
        for operation in methods.values():
            answer = operation["responses"]["200"].get("content", {}).get("application/json", {})
            if "example" in answer and "$ref" in answer["schema"]:
                name = answer["schema"]["$ref"].removeprefix("#/components/schemas/")
                getattr(schemas, name).model_validate(answer["example"])
                checked.add(name)
    assert checked >= {"Prediction", "BatchPrediction", "Explanation", "BatchExplanation", "Health", "Models"}
