"""Asking agents gives a status, or a sentence with the reason why there is none."""

import json
import time

import pytest

from contracts import status as agent_status
from contracts.status import AgentStatus, Pool, ServerStatus, VersionStatus
from control.agents import ask_agent, ask_agents

NOWHERE = "http://127.0.0.1:9"


def page(observed_at: float, role: str = "stable") -> bytes:
    version = VersionStatus("m", "1.0", role, "ready", routable=True, predict=Pool(1, 1), explain=Pool())
    server = ServerStatus("running", 0, "http://torchserve:8080")
    status = AgentStatus(observed_at, draining=False, torchserve=server, versions=(version,), plan_revision=3)
    return json.dumps(agent_status.dump(status)).encode()


@pytest.mark.parametrize(("role", "serves"), [("stable", True), ("canary", False)])
def test_a_status_has_its_age_and_says_if_the_stable_version_serves(serve, role, serves):
    asked = ask_agent(serve(lambda _: (200, page(time.time() - 5, role))))
    assert asked.status is not None
    assert (asked.status.plan_revision, asked.serves, asked.error) == (3, serves, "")
    assert asked.age_s == pytest.approx(5, abs=1)
    assert {"url", "age_s", "plan_revision"} <= set(asked.dump())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, b"<html>"), "does not answer with a status (agent status is no JSON"),
        ((200, b'{"schema": 9}'), "agent status field schema is 9, expected 1 or 2"),
        ((200, b" " * (agent_status.MAX_BYTES + 1)), "expected at most 16000000"),
        ((503, b"busy"), "does not answer (HTTPStatusError)"),
    ],
)
def test_an_agent_without_a_status_gives_an_error_sentence(serve, answer, error):
    asked = ask_agent(serve(lambda _: answer))
    assert asked.status is None
    assert error in asked.error
    assert asked.dump() == {"url": asked.url, "error": asked.error}


def test_answers_are_in_the_order_of_the_addresses(serve):
    works = serve(lambda _: (200, page(time.time())))
    first, second = ask_agents([NOWHERE, works])
    assert (first.url, first.error) == (NOWHERE, "does not answer (ConnectError)")
    assert (second.url, second.serves) == (works, True)
