"""Every documented error has an example made by the error itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway import refusals
from gateway.api import schemas
from gateway.errors import HANDLER_CODES, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


# Errors that come before a route is found, and the handler's for requests that this gateway does not send.
NOT_OF_A_ROUTE = {"bad_http", "headers_too_large", "route_unknown", "method_not_allowed", "bad_frames", "bad_options"}


def test_every_code_of_an_error_is_documented_at_a_route(make_stand: Callable[..., Stand], tmp_path: Path) -> None:
    stand = make_stand(feedback_file=tmp_path / "feedback.db", keys=(f"a:{'0' * 64}:predict",))
    documented: set[str] = set()
    for methods in stand.client.get("/openapi.json").json()["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                documented |= set(response.get("content", {}).get("application/problem+json", {}).get("examples", {}))
    kinds = [kind for kind in vars(refusals).values() if isinstance(kind, type) and "code" in vars(kind)]
    raised = {kind.code for kind in kinds} | set(HANDLER_CODES) | set(Unavailable.sentences)
    assert raised - documented == NOT_OF_A_ROUTE
