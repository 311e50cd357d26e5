"""The OpenAPI document is complete and agrees with real answers."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from gateway.app import ROUTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand


@pytest.fixture
def document(stand: Stand) -> dict[str, Any]:
    return dict(stand.client.get("/openapi.json").json())


def test_the_document_holds_exactly_the_routes(document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    routes = [route for router in ROUTERS for route in router.routes if route.include_in_schema]
    assert described == {(method, route.path) for route in routes for method in route.methods}
    assert {("POST", "/predict"), ("GET", "/health")} <= described


def test_the_default_content_type_comes_first(document: dict[str, Any]) -> None:
    assert next(iter(document["paths"]["/explain"]["post"]["responses"]["200"]["content"])) == "image/png"


def test_every_operation_has_a_name_of_its_own_and_a_described_group(document: dict[str, Any]) -> None:
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["operationId"].isidentifier() for operation in operations)
    assert {tag for operation in operations for tag in operation["tags"]} == {tag["name"] for tag in document["tags"]}


def test_only_the_document_of_a_gateway_with_keys_has_security_schemes(
    make_stand: Callable[..., Stand], document: dict[str, Any]
) -> None:
    assert "securitySchemes" not in document["components"]
    guarded = make_stand(keys=(f"a:{'0' * 64}:predict",)).client.get("/openapi.json").json()
    assert set(guarded["components"]["securitySchemes"]) == {"bearer", "header"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = set(re.findall(r"#/components/schemas/(\w+)", repr(document)))
    assert names <= set(document["components"]["schemas"])


def test_the_document_is_made_once_and_not_for_every_call(stand: Stand) -> None:
    """Check the time of 100 calls, which need no key; making the document for each took over a second of the loop."""
    first = stand.client.get("/openapi.json")
    started = time.process_time()
    answers = [stand.client.get("/openapi.json") for _ in range(100)]
    assert time.process_time() - started < 0.5
    assert {answer.content for answer in answers} == {first.content}
    assert all(len(answer.headers) == len(first.headers) for answer in answers)
