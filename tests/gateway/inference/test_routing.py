"""The version and the replica that a call gets."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections import Counter
from contextlib import ExitStack
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts import plan as traffic_plan
from gateway.errors import Unavailable
from gateway.inference.replicas import Agents
from gateway.inference.routing import Router, canary_position
from gateway.refusals import VersionUnknown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import FakeAgent, Stand

    from gateway.inference.discovery import Discovery

CANARY = {"version": "1.1.0", "archive": "cifar10-1.1.0.mar", "sha256": "1" * 64, "workers": None, "share": 25}
IMAGE = b"image-of-dog"


@pytest.fixture
def make_versions(
    tmp_path: Path, make_plan: Callable[..., dict[str, Any]], listed: Callable[..., Discovery]
) -> Callable[..., Router]:
    def make(agents: list[FakeAgent], chance: Callable[[], float] = lambda: 0.0, **plan: Any) -> Router:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(make_plan(**plan)), encoding="utf-8")
        by_host = {f"agent{index}": agent for index, agent in enumerate(agents)}
        transport = httpx.MockTransport(lambda request: by_host[request.url.host](request))
        seen = Agents(listed(*(f"http://{host}" for host in by_host)), max_age_s=3, transport=transport)
        asyncio.run(seen.poll_all(None))
        versions = Router(path, seen, chance=chance)
        versions.refresh_plan()
        return versions

    return make


def test_a_canary_gets_its_share(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    chances = iter([index / 100 for index in range(100)])
    agent = make_agent(versions=[make_version(), make_version("1.1.0", "canary")])
    versions = make_versions([agent], chance=lambda: next(chances), canary=CANARY)
    chosen = Counter(versions.choose("predict", None).version for _ in range(100))
    assert chosen == {"1.0.0": 75, "1.1.0": 25}


def test_2000_keys_are_divided_by_the_share_and_stay_on_their_side() -> None:
    keys = [f"team-{index}" for index in range(2000)]

    def side(share: float, version: str = "1.1.0", salt: str = "one") -> set[str]:
        canary = traffic_plan.Canary(version, "cifar10-1.1.0.mar", "1" * 64, share=share, salt=salt)
        return {key for key in keys if canary_position(key, canary) < share}

    sides = [side(share) for share in (0, 1, 10, 20, 50, 100)]
    for share, chosen in zip((0, 1, 10, 20, 50, 100), sides, strict=True):
        # 99.9 % of all drawings of 2,000 at this share lie within 3.29 standard deviations.
        assert abs(len(chosen) - 20 * share) <= 3.29 * math.sqrt(2000 * share / 100 * (1 - share / 100))
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(sides)), "a growing share keeps its callers"
    for other in (side(20, version="1.2.0"), side(20, salt="two")):
        # Drawn anew: a fifth of the fifth is common, 80 of 2,000.
        assert abs(len(other & sides[3]) - 80) <= 3.29 * math.sqrt(2000 * 0.04 * 0.96)


def test_a_caller_stays_on_its_side_and_one_without_a_key_does_not(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    agent = make_agent(versions=[make_version(), make_version("1.1.0", "canary")])
    versions = make_versions([agent], chance=random.Random(7).random, canary=CANARY)
    sides = {key: {versions.choose("predict", None, key).version for _ in range(50)} for key in ("a", "b", "c", "d")}
    assert all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {"1.0.0", "1.1.0"}
    assert {versions.choose("predict", None, "").version for _ in range(50)} == {"1.0.0", "1.1.0"}
    assert versions.choose("explain", None, "a").version in sides["a"], "both kinds on the same side"


def test_the_key_that_a_call_comes_with_decides_its_side(
    make_stand: Callable[..., Stand],
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    make_plan: Callable[..., dict[str, Any]],
) -> None:
    names = [f"team-{index}" for index in range(8)]
    stand = make_stand(
        agent=make_agent(versions=[make_version(), make_version("1.1.0", "canary")]),
        plan=make_plan(canary={**CANARY, "share": 50}),
        keys=tuple(f"{name}:{sha256(name.encode()).hexdigest()}:predict" for name in names),
    )

    def version(key: str) -> str:
        answer = stand.client.post("/predict", content=b"x", headers={"x-api-key": key})
        return str(answer.json()["model"]["version"])

    sides = [{version(name) for _ in range(10)} for name in names]
    assert all(len(side) == 1 for side in sides)
    assert set().union(*sides) == {"1.0.0", "1.1.0"}


def test_the_stable_version_gets_the_share_of_a_canary_that_is_not_ready(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    agent = make_agent(versions=[make_version(), make_version("1.1.0", "canary", routable=False)])
    versions = make_versions([agent], canary=CANARY)
    assert versions.choose("predict", None).version == "1.0.0"
    with pytest.raises(Unavailable):
        versions.choose("predict", "1.1.0")


def test_the_replica_with_the_fewest_calls_is_chosen(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent]
) -> None:
    versions = make_versions([make_agent(), make_agent()])
    with versions.choose("predict", None) as first, versions.choose("predict", None) as second:
        assert second.replica is not first.replica
    assert versions.choose("predict", None).replica is first.replica


def test_a_draining_replica_gets_nothing(make_versions: Callable[..., Router], make_agent: type[FakeAgent]) -> None:
    versions = make_versions([make_agent(draining=True), make_agent()])
    assert {versions.choose("predict", None).replica.url for _ in range(4)} == {"http://agent1"}


def test_a_planned_version_without_workers_is_not_ready_and_an_unplanned_one_unknown(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent]
) -> None:
    versions = make_versions([make_agent()], canary=CANARY)
    with pytest.raises(Unavailable):
        versions.choose("predict", "1.1.0")
    with pytest.raises(VersionUnknown):
        versions.choose("predict", "3.0.0")


def test_chance_breaks_ties_between_replicas(make_versions: Callable[..., Router], make_agent: type[FakeAgent]) -> None:
    versions = make_versions([make_agent(), make_agent()], chance=random.Random(1).random)
    chosen = Counter(versions.choose("predict", None).replica.url for _ in range(1000))
    # 99.9 % of all drawings of 1,000 at one half lie within 3.29 standard deviations.
    assert abs(chosen["http://agent0"] - 500) <= 3.29 * math.sqrt(250), chosen


def test_a_replica_with_more_workers_gets_more_calls_at_a_time(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    pool = {"ready": 6, "wanted": 6, "pending": 0, "capacity": 100, "fallback": 0}
    large = make_agent(versions=[make_version(predict=pool)])
    versions = make_versions([make_agent(), large], chance=random.Random(1).random)
    with ExitStack() as stack:
        held = Counter(stack.enter_context(versions.choose("predict", None)).replica.url for _ in range(80))
    assert held == {"http://agent0": 20, "http://agent1": 60}


def test_a_replica_that_cannot_be_reached_is_set_aside_until_its_agent_shows_it_well(
    make_versions: Callable[..., Router], make_agent: type[FakeAgent]
) -> None:
    agents = [make_agent(), make_agent()]
    versions = make_versions(agents)
    lost = versions.choose("predict", None)
    versions.set_aside(lost, is_lost=True)
    another = versions.choose_another(lost)
    assert another is not None and another.replica is not lost.replica  # noqa: PT018
    assert lost.replica.url not in {versions.choose("predict", None).replica.url for _ in range(20)}
    asyncio.run(versions._agents.poll_all(1))
    assert lost.replica.url in {versions.choose("predict", None).replica.url for _ in range(20)}


@pytest.fixture
def two_models(make_two_models: Callable[..., Stand]) -> Stand:
    """Return a gateway with the models cifar10, the default one, and photos, both in version 1.0.0."""
    return make_two_models()


@pytest.mark.parametrize("route", ["/predict", "/explain", "/predict/batch"])
def test_a_call_gets_the_model_that_it_names_and_else_the_default_one(two_models: Stand, route: str) -> None:
    def path(query: str) -> str:
        two_models.torchserve.calls.clear()
        assert two_models.client.post(route + query, files={"file": b"x"}).status_code == 200
        (call,) = two_models.torchserve.calls
        return call.url.path.split("/")[2].removesuffix("-explain")

    assert [path(""), path("?model=photos"), path("?model=photos&version=1.0.0"), path("?model=cifar10")] == [
        "cifar10",
        "photos",
        "photos",
        "cifar10",
    ]


def test_each_models_name_stands_in_its_answers_and_an_unknown_one_is_404(two_models: Stand) -> None:
    client = two_models.client
    assert client.post("/predict?model=photos", content=b"x").json()["model"] == {"name": "photos", "version": "1.0.0"}
    unknown = client.post("/predict?model=dogs", content=b"x")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "model_unknown")
    refused = client.post("/predict?model=..%2Fx", content=b"x")
    assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")
    assert client.get("/v2/models/photos").json()["versions"] == ["1.0.0"]
    assert {version["model"] for version in client.get("/models").json()["versions"]} == {"cifar10", "photos"}


def test_a_model_that_is_kept_unloaded_is_no_fault_and_its_calls_get_503(
    make_two_models: Callable[..., Stand], make_agent: type[FakeAgent]
) -> None:
    stand = make_two_models(agent=make_agent())
    plan = json.loads(stand.plan.read_text(encoding="utf-8"))
    plan["models"][1]["stable"]["workers"] = 0
    stand.plan.write_text(json.dumps({**plan, "revision": 2}), encoding="utf-8")
    stand.wait_until(lambda: stand.app.state.gateway.router.revision == 2)
    assert stand.client.get("/health").json()["status"] == "ok"
    assert stand.client.post("/predict?model=photos", content=b"x").status_code == 503
    assert stand.client.post("/predict", content=b"x").status_code == 200


@pytest.mark.parametrize("route", ["/predict?version=9.9.9", "/explain?version=9.9.9"])
def test_an_unknown_version_is_404(stand: Stand, route: str, assert_problem: Callable[..., None]) -> None:
    assert_problem(stand.client.post(route, content=IMAGE), 404, "version_unknown")
