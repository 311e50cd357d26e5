"""The agent's private pages: status and readiness."""

import asyncio
import json
import logging
import time
from dataclasses import replace

import httpx
import pytest

from contracts import status as agent_status
from contracts.model import Accepted, Ancestor, Contract, Figures, Input
from control.agent.agent import Agent
from control.agent.deployment import Deployment, Wanted
from control.agent.torchserve.management import Management, Registered, Worker
from control.agent.torchserve.run_folder import RunFolder
from control.settings import AgentSettings


@pytest.fixture
def agent(tmp_path):
    settings = AgentSettings(plan=tmp_path / "plan.json", workers=1)
    with RunFolder(tmp_path) as folder:
        management = Management(httpx.AsyncHTTPTransport(uds=str(folder.management_socket)), logging.getLogger("test"))
        yield Agent(settings, folder, management)


def serve(agent, role="stable", *, verified=True, ready=True):
    worker = Registered("1.0.0", "m.mar", 1, (Worker(pid=1, ready=ready),), 0, 100)
    wanted = Wanted(
        model="m", version="1.0.0", archive="m.mar", sha256="0" * 64, role=role, workers=1, explain_workers=1
    )
    agent._reconciler.deployments["m", "1.0.0"] = Deployment(wanted, predict=worker, verified=verified)


def ask(agent, path, **headers):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(agent.app()), base_url="http://agent") as client:
            return await client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return asyncio.run(ask())


def status(agent):
    return ask(agent, "/readyz").status_code


def test_the_status_page_has_the_report_of_each_gateway(agent):
    report = '{"id":"g1","revision":7,"in_flight":{"1.0.0":2}}'
    assert ask(agent, "/status", x_gradserve_gateway="nonsense").json()["gateways"] == []
    (heard,) = ask(agent, "/status", x_gradserve_gateway=report).json()["gateways"]
    assert {**heard, "heard_s": 0} == {"id": "g1", "revision": 7, "in_flight": {"1.0.0": 2}, "heard_s": 0}


def test_the_status_page_has_the_contracts_figures_but_no_path_of_the_training(agent):
    serve(agent)
    (deployment,) = agent._reconciler.deployments.values()
    assert ask(agent, "/status").json()["versions"][0]["contract"] is None
    accepted = Accepted(Figures(validation_accuracy=0.9), recipe={"data": "imagefolder:/home/alice/pets"})
    accepted = replace(accepted, ancestor=Ancestor("first", "1", accepted))
    size = Input(32, 32, (0.5,) * 3, (0.5,) * 3)
    deployment.contract = Contract("m", "1.0.0", ("cat", "dog"), size, "resnet18", accepted=accepted)
    page = ask(agent, "/status")
    assert "alice" not in page.text
    assert page.json()["versions"][0]["contract"]["accepted"]["figures"]["validation_accuracy"] == 0.9


def test_draining_waits_for_the_requests_that_gateways_have_in_flight(agent, monkeypatch):
    monkeypatch.setattr("control.agent.agent._POLLER_GONE_S", 30)

    def poll(in_flight):
        agent._reconciler.gateways.record(f'{{"id":"g1","revision":7,"in_flight":{in_flight}}}', time.monotonic())

    async def drain():
        poll("{}")
        draining = asyncio.create_task(agent.drain())
        for in_flight in ("{}", '{"1.0.0":1}', '{"1.0.0":1}'):
            await asyncio.sleep(0.12)
            assert not draining.done()
            poll(in_flight)
        await asyncio.sleep(0.12)
        assert not draining.done()
        poll("{}")
        await asyncio.wait_for(draining, 1)

    asyncio.run(drain())


def test_agent_is_ready_with_a_verified_ready_stable_worker(agent):
    assert status(agent) == 503
    serve(agent)
    assert status(agent) == 200


@pytest.mark.parametrize("less", [{"role": "canary"}, {"verified": False}, {"ready": False}])
def test_agent_is_not_ready_without_one_of_these(agent, less):
    serve(agent, **less)
    assert status(agent) == 503


def test_agent_is_not_ready_while_it_drains_or_with_an_old_observation(agent):
    serve(agent)
    agent._observed_at -= 10
    assert status(agent) == 503
    agent._observed_at += 10
    agent._draining = True
    assert status(agent) == 503


def test_the_status_has_the_agents_clock(agent):
    serve(agent)
    status = agent_status.parse(ask(agent, "/status").content)
    assert status.told_at == pytest.approx(time.time(), abs=1)
    assert [version.version for version in status.versions] == ["1.0.0"]


def test_a_deeply_nested_plan_is_refused_and_the_last_one_stays_in_force(agent, tmp_path):
    release = {"version": "1.0.0", "archive": "m.mar", "sha256": "0" * 64, "workers": None}
    plan = {"schema": 1, "revision": 1, "model": "m", "stable": release}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert agent._reconciler.follow_plan().revision == 1
    (tmp_path / "plan.json").write_text("[" * 100_000)
    assert agent._reconciler.follow_plan().revision == 1
    assert "no JSON" in ask(agent, "/status").json()["plan_error"]


def test_explain_workers_count_only_after_verification(agent):
    serve(agent)
    (deployment,) = agent._reconciler.deployments.values()
    deployment.explain = deployment.predict
    assert ask(agent, "/status").json()["versions"][0]["explain"]["ready"] == 0
    deployment.explains = True
    assert ask(agent, "/status").json()["versions"][0]["explain"]["ready"] == 1


def test_an_agent_is_alive_before_it_is_ready_and_while_it_drains(agent):
    agent._draining = True
    assert (ask(agent, "/livez").status_code, ask(agent, "/readyz").status_code) == (200, 503)
