"""Which version and replica a call gets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.agents import Agents
from gateway.errors import Unavailable
from gateway.refusals import VersionUnknown
from gateway.versions import Versions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import FakeAgent

CANARY = {"version": "1.1.0", "archive": "cifar10-1.1.0.mar", "sha256": "1" * 64, "workers": None, "share": 25}


@pytest.fixture
def make_versions(
    tmp_path: Path, make_plan: Callable[..., dict[str, Any]], make_agent: type[FakeAgent]
) -> Callable[..., Versions]:
    def make(agents: list[FakeAgent], chance: Callable[[], float] = lambda: 0.0, **plan: Any) -> Versions:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(make_plan(**plan)), encoding="utf-8")
        by_host = {f"agent{index}": agent for index, agent in enumerate(agents)}
        transport = httpx.MockTransport(lambda request: by_host[request.url.host](request))
        seen = Agents(tuple(f"http://{host}" for host in by_host), max_age_s=3, transport=transport)
        asyncio.run(seen.poll_all(None))
        versions = Versions(path, seen, chance=chance)
        versions.refresh_plan()
        return versions

    return make


def test_a_canary_gets_its_share(
    make_versions: Callable[..., Versions], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    chances = iter([index / 100 for index in range(100)])
    agent = make_agent(versions=[make_version(), make_version("1.1.0", "canary")])
    versions = make_versions([agent], chance=lambda: next(chances), canary=CANARY)
    chosen = Counter(versions.choose("predict", None).version for _ in range(100))
    assert chosen == {"1.0.0": 75, "1.1.0": 25}


def test_a_canary_that_cannot_answer_leaves_its_share_to_the_stable_version(
    make_versions: Callable[..., Versions], make_agent: type[FakeAgent], make_version: Callable[..., dict[str, Any]]
) -> None:
    agent = make_agent(versions=[make_version(), make_version("1.1.0", "canary", routable=False)])
    versions = make_versions([agent], canary=CANARY)
    assert versions.choose("predict", None).version == "1.0.0"
    with pytest.raises(Unavailable):
        versions.choose("predict", "1.1.0")


def test_the_replica_with_the_fewest_calls_is_chosen(
    make_versions: Callable[..., Versions], make_agent: type[FakeAgent]
) -> None:
    versions = make_versions([make_agent(), make_agent()])
    with versions.choose("predict", None) as first, versions.choose("predict", None) as second:
        assert second.replica is not first.replica
    assert versions.choose("predict", None).replica is first.replica


def test_a_draining_replica_gets_nothing(make_versions: Callable[..., Versions], make_agent: type[FakeAgent]) -> None:
    versions = make_versions([make_agent(draining=True), make_agent()])
    assert {versions.choose("predict", None).replica.url for _ in range(4)} == {"http://agent1"}


def test_a_planned_version_that_nobody_has_yet_is_not_ready_and_another_unknown(
    make_versions: Callable[..., Versions], make_agent: type[FakeAgent]
) -> None:
    versions = make_versions([make_agent()], canary=CANARY)
    with pytest.raises(Unavailable):
        versions.choose("predict", "1.1.0")
    with pytest.raises(VersionUnknown):
        versions.choose("predict", "3.0.0")


@pytest.mark.parametrize("body", [b"{}", b"[]", b"no json", b'{"torchserve":null}', b'{"observed_at":"x"}'])
def test_a_report_that_is_none_is_no_status(body: bytes) -> None:
    agents = Agents(
        ("http://a",), max_age_s=3, transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body))
    )
    asyncio.run(agents.poll_all(None))
    assert agents.current() == []
