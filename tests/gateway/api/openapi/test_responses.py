"""Every documented error has an example made by the error itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.api import schemas

if TYPE_CHECKING:
    from conftest import Stand


@pytest.fixture
def document(stand: Stand) -> dict[str, Any]:
    return dict(stand.client.get("/openapi.json").json())


def test_every_error_has_an_example_with_its_own_status(document: dict[str, Any]) -> None:
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                for code, example in (
                    response["content"].get("application/problem+json", {}).get("examples", {}).items()
                ):
                    problem = schemas.Problem.model_validate(example["value"])
                    assert (str(problem.status), problem.code) == (status, code)
