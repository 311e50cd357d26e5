"""Routes need the key's scope that they declare, and only the listed ones need no key."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from gateway.app import ROUTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

IMAGE = b"image-of-dog"
INFER = "/v2/models/cifar10/infer"
KEYS = {
    "predict": "the-predict-key",
    "explain": "the-explain-key",
    "read": "the-read-key",
}

GUARDED = [
    ("POST", "/predict", "predict"),
    ("POST", "/predict/batch", "predict"),
    ("POST", "/explain", "explain"),
    ("POST", "/explain/batch", "explain"),
    ("GET", "/models/cifar10/versions/1.0.0/examples/1.png", "explain"),
    ("GET", "/models", "read"),
    ("GET", "/metrics", "read"),
    ("GET", "/v2", "predict"),
    ("GET", "/v2/models/cifar10", "predict"),
    ("GET", "/v2/models/cifar10/ready", "predict"),
    ("POST", INFER, "predict"),
]

PUBLIC = {"/livez", "/readyz", "/health", "/openapi.json", "/v2/health/live", "/v2/health/ready"}


def entries() -> tuple[str, ...]:
    return tuple(f"{name}:{hashlib.sha256(key.encode()).hexdigest()}:{name}" for name, key in KEYS.items())


def test_every_route_that_is_not_public_needs_a_key(make_stand: Callable[..., Stand]) -> None:
    client = make_stand(keys=entries()).client
    routes = [route for router in ROUTERS for route in router.routes if route.include_in_schema]
    for route in routes:
        path = re.sub(r"{(\w+)}", lambda found: {"model": "cifar10", "name": "cifar10"}.get(found[1], "1"), route.path)
        for method in route.methods:
            is_refused = client.request(method, path).status_code == 401
            assert is_refused == (route.path not in PUBLIC), (method, route.path)
    assert PUBLIC - {route.path for route in routes} <= {"/openapi.json"}


@pytest.mark.parametrize(("method", "route", "scope"), GUARDED)
def test_no_key_is_401_a_wrong_one_401_and_a_missing_scope_403(
    make_stand: Callable[..., Stand],
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    method: str,
    route: str,
    scope: str,
    assert_problem: Callable[..., None],
) -> None:
    stand = make_stand(keys=entries(), agent=make_agent([make_version(schema=3)]))
    client, body = stand.client, stand.body(route, IMAGE) if method == "POST" else {}
    missing = client.request(method, route, **body)
    assert_problem(missing, 401, "key_missing")
    assert missing.headers["www-authenticate"] == "Bearer"
    assert_problem(client.request(method, route, headers={"x-api-key": "nonsense"}, **body), 401, "key_unknown")
    other = next(key for name, key in KEYS.items() if name != scope)
    assert_problem(client.request(method, route, headers={"x-api-key": other}, **body), 403, "scope_missing")
    right = client.request(method, route, headers={"authorization": f"Bearer {KEYS[scope]}"}, **body)
    assert right.status_code == 200


@pytest.mark.parametrize("route", ["/health", "/livez", "/readyz", "/docs", "/openapi.json", "/v2/health/live"])
def test_open_routes_need_no_key(make_stand: Callable[..., Stand], route: str) -> None:
    assert make_stand(keys=entries()).client.get(route).status_code == 200


def test_the_deadline_travels_in_unix_milliseconds_capped_by_the_setting(make_stand: Callable[..., Stand]) -> None:
    stand = make_stand(timeout_s=2.0)
    for asked in ("500", "99999999"):
        stand.client.post("/predict", content=b"x", headers={"x-timeout-ms": asked})
    short, long = (json.loads(call.headers["x-gradserve"])["deadline"] for call in stand.torchserve.calls)
    assert 1300 < long - short < 2500
