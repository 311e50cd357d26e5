"""Measure what replicas cost a gateway process: its processor time for a poll of a status, and for routing a call.

A process of its own answers with a real status document on as many loopback addresses as there are replicas. The
gateway's own `Agents` polls them over HTTP, and its own `Router` chooses among them. From the time for a poll of 100
replicas follows the number of replicas whose polls use one core; then so many are polled as often as a gateway does,
and ten times 100 too. Of an agent, the time to write its status is measured, which grows with the gateway processes
that report to it. Figures are medians with the range over the rounds.

    python benchmarks/capacity.py [--rounds 5]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from this folder, `gateway` would be a file

import argparse
import asyncio
import json
import os
import tempfile
import time
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from benchmarks.gateway import environment_facts
from benchmarks.serving.figures import spread
from benchmarks.serving.servers import ROOT
from contracts import model as model_contract
from contracts import plan as traffic_plan
from contracts import status as agent_status
from contracts.report import Report
from contracts.status import AgentStatus, GatewayStatus, Pool, ServerStatus, VersionStatus
from gateway.inference.discovery import Discovery
from gateway.inference.replicas import Agents
from gateway.inference.routing import Router
from gateway.server.open_files import raise_open_files_limit
from gateway.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from contracts.model import Contract

RESULT = Path(__file__).parent / "results" / "capacity.json"
REPLICAS = (1, 10, 100)
MANY = 1000
TICKS_S = 4.0
GATEWAYS = (2, 10, 100, 256)
POLLS = 200  # in each measurement, over all replicas
ROUTES = 50
REPORTING = 10  # gateway processes in the status that is polled
STAYS_FRESH_S = 1e6


def main() -> None:
    """Measure, print and write the JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--output", type=Path, default=RESULT)
    chosen = options.parse_args()
    poll_every_s = Settings.model_fields["poll_s"].default
    report: dict[str, Any] = {
        "rounds": chosen.rounds,
        "poll_every_s": poll_every_s,
        "replicas": {},
        "agent": {},
        "polled": {},
    }
    for count in REPLICAS:
        rounds = [asyncio.run(measure_gateway(count)) for _ in range(chosen.rounds)]
        report["replicas"][count] = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    for count in GATEWAYS:
        rounds = [measure_agent(count) for _ in range(chosen.rounds)]
        report["agent"][count] = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    poll_ms = report["replicas"][REPLICAS[-1]]["poll_ms"]["median"]
    report["replicas_that_use_one_core"] = full = round(1000 * poll_every_s / poll_ms)
    for count in (full // 2, full, MANY):
        rounds = [asyncio.run(measure_gateway(count, poll_every_s)) for _ in range(chosen.rounds)]
        report["polled"][count] = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    report |= {"load_average": os.getloadavg()[0], "environment": environment_facts()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "environment"}, indent=2))
    print(f"written to {chosen.output}")


async def measure_gateway(count: int, poll_every_s: float | None = None) -> dict[str, float]:
    """Return what `count` replicas cost a gateway process; with `poll_every_s`, when they are polled so often."""
    raise_open_files_limit()
    hosts = [f"127.1.{number // 250}.{number % 250 + 1}" for number in range(count)]
    ours, theirs = get_context("spawn").Pipe()
    server = get_context("spawn").Process(target=serve, args=(hosts, json.dumps(status(REPORTING)).encode(), theirs))
    server.start()
    try:
        agents = Agents(Discovery(f"http://{host}:{ours.recv()}" for host in hosts), max_age_s=STAYS_FRESH_S)
        await agents.poll_all(1)
        return await (measure_polls(agents, count) if poll_every_s is None else measure_ticks(agents, poll_every_s))
    finally:
        await agents.close()
        server.kill()
        server.join()


async def measure_polls(agents: Agents, count: int) -> dict[str, float]:
    """Return the processor time for a poll (ms) and for choosing a replica (µs), and the replicas that answered."""
    times = max(1, POLLS // count)
    began = time.process_time()
    for _ in range(times):
        await agents.poll_all(1)
    poll_ms = 1000 * (time.process_time() - began) / (times * count)
    return {"poll_ms": poll_ms, "route_us": measure_routing(agents), "replicas_seen": len(agents.current())}


async def measure_ticks(agents: Agents, poll_every_s: float) -> dict[str, float]:
    """Return the share of a core that polls take, the seconds between two of a replica, and the share set aside."""
    began, used, polls = time.monotonic(), time.process_time(), 0
    while (now := time.monotonic()) - began < TICKS_S:
        agents.begin_polls(1)
        await asyncio.sleep(poll_every_s)
        polls += sum(replica.asked_at >= now for replica in agents.replicas)
    lasted_s, count = time.monotonic() - began, len(agents.replicas)
    aside = sum(replica.is_avoided(time.monotonic()) for replica in agents.replicas)
    return {
        "share_of_a_core": (time.process_time() - used) / lasted_s,
        "between_polls_s": lasted_s * count / max(1, polls),
        "share_set_aside": aside / count,
    }


def measure_routing(agents: Agents) -> float:
    """Return the microseconds in which a call gets its replica and the number of workers."""
    contract = released_contract()
    stable = traffic_plan.Release(contract.version, "cifar10.mar", "0" * 64)
    plan = traffic_plan.Plan(1, contract.name, stable)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(traffic_plan.dump(traffic_plan.Plans(1, contract.name, (plan,)))), encoding="utf-8")
        router = Router(path, agents)
        router.refresh_plan()
        began = time.process_time()
        for _ in range(ROUTES):
            router.workers(router.choose("predict", None))
        return 1e6 * (time.process_time() - began) / ROUTES


def measure_agent(gateways: int) -> dict[str, float]:
    """Return the milliseconds in which an agent writes its status, and the status's kilobytes."""
    began = time.process_time()
    for _ in range(ROUTES):
        written = json.dumps(status(gateways)).encode()
    return {"write_ms": 1000 * (time.process_time() - began) / ROUTES, "kilobytes": len(written) / 1000}


def status(gateways: int) -> dict[str, Any]:
    """Return the status of a replica with one version of the released model, to which `gateways` processes report."""
    contract = released_contract()
    pool = Pool(ready=2, wanted=2, pending=0, capacity=100)
    version = VersionStatus(
        contract.name, contract.version, "stable", "ready", routable=True, predict=pool, explain=pool, verified=True
    )
    reports = [GatewayStatus(Report(f"{number:032x}", 1, {}), 0.1) for number in range(gateways)]
    now = time.time()
    server = ServerStatus("running", 0, "http://127.0.0.1:1", pid=1)
    told = AgentStatus(now, draining=False, torchserve=server, versions=(replace(version, contract=contract),))
    return agent_status.dump(replace(told, told_at=now, plan_revision=1, gateways=tuple(reports)))


@cache
def released_contract() -> Contract:
    """Return the contract of the released model."""
    return model_contract.load(ROOT / "model_store" / "released" / "contract.json")


def serve(hosts: list[str], body: bytes, told: Connection) -> None:
    """Answer every request on one port of the hosts with `body`; send the port first, once for each host."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(head + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    raise_open_files_limit()

    async def run() -> None:
        first = await asyncio.start_server(answer, hosts[0], 0, backlog=1000)
        port = first.sockets[0].getsockname()[1]
        others = [await asyncio.start_server(answer, host, port, backlog=1000) for host in hosts[1:]]
        for _ in hosts:
            told.send(port)
        await asyncio.gather(*(server.serve_forever() for server in (first, *others)))

    asyncio.run(run())


if __name__ == "__main__":
    main()
