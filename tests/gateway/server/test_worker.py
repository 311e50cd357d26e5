"""The real process: Gunicorn, uvicorn and sockets. Slow senders are cut off; a stop or a reload loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvloop
from uvicorn.config import Config
from uvicorn.server import ServerState

from gateway.auth import keys
from gateway.server.worker import GuardedProtocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import FakeAgent

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def gateway(start_gateway: Callable[..., tuple[str, int]]) -> tuple[str, int]:
    """Return the address and the master's pid of a gateway with two workers and short timeouts."""
    return start_gateway(
        WORKERS="2", DRAIN_S="0.5", HEADER_TIMEOUT_S="0.6", BODY_TIMEOUT_S="0.6", MAX_HEADER_BYTES="4096"
    )


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def say(base: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send `parts` with pauses, and return the bytes that come back until the connection is closed."""
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for part in parts:
            with contextlib.suppress(ConnectionError):
                connection.sendall(part)
            time.sleep(pause_s)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    return answer


def test_a_connection_that_sends_nothing_is_closed(gateway: tuple[str, int]) -> None:
    started = time.monotonic()
    assert say(gateway[0]) == b""
    assert 0.4 < time.monotonic() - started < 8


def test_headers_that_trickle_are_cut_off(gateway: tuple[str, int]) -> None:
    started = time.monotonic()
    assert say(gateway[0], b"GET /livez HTTP/1.1\r\n", *[b"a: b\r\n"] * 20, pause_s=0.05) == b""
    assert time.monotonic() - started < 8


def test_a_body_that_trickles_gets_408(gateway: tuple[str, int]) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    answer = say(gateway[0], head, *[b"x"] * 3, pause_s=0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in answer


def test_a_body_that_trickles_on_after_its_refusal_is_cut_off(gateway: tuple[str, int]) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ncontent-length: 1000\r\n\r\n"
    started = time.monotonic()
    answer = say(gateway[0], head, *[b"x"] * 4, pause_s=0.1)
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert time.monotonic() - started < 8


MIB = 1024 * 1024


@pytest.mark.parametrize("size_mib", [7, 20])
@pytest.mark.parametrize("route", ["/predict", "/v2/models/cifar10/infer?"])
def test_callers_that_are_still_sending_get_the_413(gateway: tuple[str, int], size_mib: int, route: str) -> None:
    """Use Python's clients: they read the answer only after they have sent everything; urllib sends `close` too."""
    size = size_mib * MIB if route == "/predict" else 33 * MIB
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(gateway[0] + route, data=b"x" * size, timeout=20)
        assert refused.value.code == 413
        assert json.load(refused.value)["code"] == "body_too_large"

        connection = http.client.HTTPConnection(gateway[0].removeprefix("http://"), timeout=20)
        connection.request("POST", route, body=b"x" * size)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["code"]) == (413, "body_too_large")
        connection.close()


def test_callers_that_are_refused_for_another_reason_get_their_answer_too(gateway: tuple[str, int]) -> None:
    request = urllib.request.Request(gateway[0] + "/predict", b"x" * 20 * MIB, {"content-type": "text/plain"})
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == 415
        refused.value.close()


def test_a_raw_socket_reads_the_413_before_it_sends_the_body_and_may_go_on(gateway: tuple[str, int]) -> None:
    host, port = gateway[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (20 * MIB))
        answer = connection.recv(65536)
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")
        for _ in range(20):
            connection.sendall(b"x" * MIB)
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_caller_that_never_stops_sending_is_cut_off(gateway: tuple[str, int]) -> None:
    host, port = gateway[0].removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while sent < 200 * MIB:
                connection.sendall(b"x" * MIB)
                sent += MIB
    assert 60 * MIB <= sent < 100 * MIB


@pytest.mark.parametrize(
    "headers",
    [b"a: " + b"x" * 5000 + b"\r\n", b"a: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n" * 90, b"a:b\r\n" * 101],
)
def test_headers_over_the_limit_get_431(gateway: tuple[str, int], headers: bytes) -> None:
    answer = say(gateway[0], b"GET /livez HTTP/1.1\r\n" + headers + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_large"' in answer


def test_a_header_without_end_gets_431_before_it_fills_the_memory(gateway: tuple[str, int]) -> None:
    answer = say(gateway[0], b"GET /livez HTTP/1.1\r\na: ", *[b"x" * 2000] * 4, pause_s=0.02)
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_a_trailer_without_end_is_cut_off_before_it_fills_the_memory(gateway: tuple[str, int]) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"
    assert say(gateway[0], head, b"0\r\na: ", *[b"x" * 2000] * 4, pause_s=0.02).startswith(b"HTTP/1.1 431 ")
    last = head.replace(b"host: x", b"connection: close")
    assert say(gateway[0], last, b"0\r\na: b\r\n\r\n", pause_s=0.02).startswith(b"HTTP/1.1 200 ")


def test_too_many_pipelined_requests_close_the_connection(gateway: tuple[str, int]) -> None:
    answers = say(gateway[0], b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 2000)
    assert answers.count(b"HTTP/1.1 ") < 20
    assert answers.endswith(b"}"), "whole answers"
    assert b'"code":"bad_http"' in answers


def test_a_connection_whose_answer_is_not_read_is_aborted(gateway: tuple[str, int]) -> None:
    host, port = gateway[0].removeprefix("http://").split(":")
    asked = 8
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n" * asked)
        time.sleep(3)  # five times as long as an answer may take to be read
        received = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(1 << 20):
                received += chunk
    assert 0 < received.count(b"HTTP/1.1 200") < asked


def test_calls_without_a_place_are_refused_on_connections_that_stay_open(
    start_gateway: Callable[..., tuple[str, int]],
) -> None:
    base, _ = start_gateway(WORKERS="1", IN_FLIGHT_PREDICT="1", ADMISSION_WAIT_S="0.01")

    def call_often(caller: int) -> list[int]:
        """Check that every answer belongs to its call, even if the refusal came before its body."""
        statuses = []
        with httpx.Client(base_url=base, timeout=20) as client:
            for turn in range(30):
                own = {"x-request-id": f"caller-{caller}-{turn}"}
                answer = client.post("/predict", content=b"image-of-dog" + b" " * 100_000 * (turn % 2), headers=own)
                assert (answer.headers["x-request-id"], answer.json()["request_id"]) == (own["x-request-id"],) * 2
                statuses.append(answer.status_code)
                if answer.status_code == 503:
                    assert answer.headers["content-type"] == "application/problem+json"
                    assert (answer.json()["code"], answer.headers["retry-after"]) == ("saturated", "1")
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = [status for answers in pool.map(call_often, range(8)) for status in answers]
    assert {200, 503} == set(statuses)
    refused = statuses.count(503)
    counts = (
        f'gateway_refused_total{{code="saturated",model="cifar10"}} {refused}.0',
        f'gateway_requests_total{{method="POST",route="/predict",status="503"}} {refused}.0',
    )
    wait_until(lambda: all(count in httpx.get(f"{base}/metrics").text for count in counts), 10)


def read_200(connection: socket.socket) -> None:
    """Read a whole answer of JSON with the status 200; its head and its body may come one after the other."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_connection_over_the_limit_ends_the_longest_idle_one_or_is_closed_while_all_are_in_use(
    start_gateway: Callable[..., tuple[str, int]],
) -> None:
    base, _ = start_gateway(WORKERS="1", MAX_CONNECTIONS="3", KEEP_ALIVE_S="60")
    host, port = base.removeprefix("http://").split(":")
    ask = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    begun = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nx"
    with contextlib.ExitStack() as held:

        def connect(count: int) -> list[socket.socket]:
            address = (host, int(port))
            return [held.enter_context(socket.create_connection(address, timeout=20)) for _ in range(count)]

        connections = connect(3)
        for connection in connections:
            connection.sendall(ask)
            read_200(connection)
        connections += connect(2)  # these come when the first three are idle
        connections[3].sendall(begun)
        connections[4].sendall(begun)
        assert [connection.recv(1) for connection in connections[:2]] == [b"", b""]
        connections[2].sendall(begun)  # now all three are in use
        (last,) = connect(1)
        assert last.recv(4096) == b""
        for connection in connections[2:]:
            connection.sendall(b"x")
            read_200(connection)


def test_callers_who_only_hold_connections_do_not_keep_others_out(
    start_gateway: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    """Use a low limit of open files: without a reserve, connections left none for TorchServe, plan and keys."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))  # inherited by the gateway
    try:
        base, _ = start_gateway(tmp_path, WORKERS="1", MAX_CONNECTIONS="600")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, port = base.removeprefix("http://").split(":")
    ask = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(700):
            connection = held.enter_context(socket.create_connection((host, int(port)), timeout=20))
            connection.sendall(ask)
        assert all(can_predict(base) for _ in range(5))
        plan = json.loads((tmp_path / "plan.json").read_text())
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "revision": 2, "stable": None}))
        wait_until(lambda: "stable" in httpx.get(f"{base}/health").text.split("reasons")[1], 5)


def test_a_stop_finishes_the_request_that_is_being_sent(start_gateway: Callable[..., tuple[str, int]]) -> None:
    base, master = start_gateway(WORKERS="1", DRAIN_S="1")
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nx")
        time.sleep(0.2)
        os.kill(master, signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{base}/readyz").json().get("code") == "draining", 5)
        wait_until(lambda: not accepts(host, int(port)), 10)
        connection.sendall(b"x")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def accepts(host: str, port: int) -> bool:
    try:
        return say(f"http://{host}:{port}", b"GET /livez HTTP/1.1\r\nconnection: close\r\n\r\n") != b""
    except ConnectionError:
        return False


def test_what_is_no_http_gets_400(gateway: tuple[str, int]) -> None:
    answer = say(gateway[0], b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"bad_http"' in answer


def test_large_bodies_and_pipelined_requests_are_not_taken_for_headers(gateway: tuple[str, int]) -> None:
    body = b"x" * 200_000
    post = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + body
    last = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = say(gateway[0], post + post + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_metrics_add_up_over_the_workers(gateway: tuple[str, int]) -> None:
    base, _ = gateway
    for _ in range(12):  # a new connection each, so that both workers get some
        assert httpx.post(f"{base}/predict", content=b"x").status_code == 200

    def count() -> float:
        lines = httpx.get(f"{base}/metrics").text.splitlines()
        wanted = 'gateway_requests_total{method="POST",route="/predict",status="200"}'
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted))

    first = count()
    assert first >= 12
    assert [count() for _ in range(6)] == [first] * 6, "whichever worker is asked"


def test_a_reload_under_load_loses_no_request(start_gateway: Callable[..., tuple[str, int]]) -> None:
    base, master = start_gateway(WORKERS="2", DRAIN_S="4")
    before = workers_of(master)
    stop = threading.Event()
    statuses: list[int] = []
    failures: list[Exception] = []

    def call() -> None:
        with httpx.Client(base_url=base, timeout=10) as client:
            while not stop.is_set():
                try:
                    statuses.append(client.post("/predict", content=b"x").status_code)
                except httpx.TransportError as error:
                    failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: len(workers_of(master)) == 2 and not workers_of(master) & before, 60)
        time.sleep(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(statuses) > 20
    assert set(statuses) == {200}


def test_code_that_changes_on_disk_reaches_no_worker_before_a_restart(
    start_gateway: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    code = tmp_path / "code"
    for package in ("gateway", "config"):
        shutil.copytree(ROOT / package, code / package)
    base, master = start_gateway(tmp_path, code=code, WORKERS="1")
    first = workers_of(master)
    for path in (code / "gateway").rglob("*.py"):
        path.write_text("raise RuntimeError('half of a new release')\n", encoding="utf-8")
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: bool(workers_of(master)) and not workers_of(master) & first, 20)
    wait_until(lambda: can_predict(base), 20)
    second = workers_of(master)
    os.kill(master, signal.SIGHUP)
    wait_until(lambda: "new code needs a restart" in (tmp_path / "log").read_text(), 20)
    assert workers_of(master) == second
    assert can_predict(base)


def can_predict(base: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.post(f"{base}/predict", content=b"x").status_code == 200
    return False


def test_every_worker_follows_the_plan_within_a_second_and_keeps_the_last_good_one(
    start_gateway: Callable[..., tuple[str, int]],
    tmp_path: Path,
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    make_plan: Callable[..., dict[str, Any]],
) -> None:
    agent = make_agent(versions=[make_version("1.0.0"), make_version("2.0.0")])
    base, master = start_gateway(folder=tmp_path, agent=agent, WORKERS="3")
    wait_until(lambda: len(agent.processes) == 3, 20)
    workers = workers_of(master)

    def put(revision: int, version: str) -> float:
        """Write a plan, and return the seconds until every worker routes by it."""
        stable = {"version": version, "archive": f"cifar10-{version}.mar", "sha256": "0" * 64, "workers": None}
        (tmp_path / "next.json").write_text(json.dumps(make_plan(revision=revision, stable=stable)), encoding="utf-8")
        began = time.monotonic()
        (tmp_path / "next.json").replace(tmp_path / "plan.json")
        wait_until(lambda: {said["revision"] for said in agent.processes.values()} == {revision}, 20)
        return time.monotonic() - began

    def served() -> set[str]:
        """Return the versions that answer on new connections, which reach different workers."""
        with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0)) as client:
            answers = [client.post(f"{base}/predict", content=b"x") for _ in range(9)]
        assert {answer.status_code for answer in answers} == {200}
        return {answer.json()["model"]["version"] for answer in answers}

    def complaints(sentence: str) -> list[dict[str, Any]]:
        lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if sentence in line and '"level":"error"' in line]

    took = []
    for revision, version in ((2, "2.0.0"), (3, "1.0.0"), (4, "2.0.0")):
        took.append(put(revision, version))
        assert served() == {version}
    assert sorted(took)[1] < 1.0, "the machine may stand still once"

    (tmp_path / "next.json").write_text('{"schema": 1', encoding="utf-8")
    (tmp_path / "next.json").replace(tmp_path / "plan.json")
    wait_until(lambda: len(complaints("plan is no JSON")) == 3, 20)
    assert served() == {"2.0.0"}
    (tmp_path / "plan.json").unlink()
    wait_until(lambda: len(complaints("there is no traffic plan")) == 3, 20)
    assert served() == {"2.0.0"}
    assert {line["revision_in_force"] for line in complaints("traffic plan not used")} == {4}
    assert httpx.get(f"{base}/health").json()["status"] == "degraded"

    put(5, "1.0.0")
    assert served() == {"1.0.0"}
    assert workers_of(master) == workers, "nobody was restarted"


@pytest.mark.long
def test_2000_callers_stay_on_their_sides_of_a_canary_whichever_worker_they_reach(
    start_gateway: Callable[..., tuple[str, int]],
    tmp_path: Path,
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    make_plan: Callable[..., dict[str, Any]],
) -> None:
    names = [f"team-{index}" for index in range(2000)]
    keys = [{"name": name, "sha256": sha256(name.encode()).hexdigest(), "scopes": ["predict"]} for name in names]
    (tmp_path / "keys.json").write_text(json.dumps({"schema": 1, "keys": keys}), encoding="utf-8")
    agent = make_agent(versions=[make_version("1.0.0"), make_version("1.1.0", "canary")])
    base, _ = start_gateway(
        folder=tmp_path,
        agent=agent,
        WORKERS="2",
        KEYS_FILE=str(tmp_path / "keys.json"),
        IN_FLIGHT_PREDICT="32",  # all of them may come to one process: refusals are not what this is about
    )
    canary = {"version": "1.1.0", "archive": "cifar10-1.1.0.mar", "sha256": "1" * 64, "workers": None, "salt": "a"}

    def sides(revision: int, share: float) -> set[str]:
        """Return the callers whose calls the canary answered; the stable version answered all calls of the others."""
        plan = make_plan(revision=revision, canary={**canary, "share": share})
        (tmp_path / "next.json").write_text(json.dumps(plan), encoding="utf-8")
        (tmp_path / "next.json").replace(tmp_path / "plan.json")
        wait_until(lambda: {said["revision"] for said in agent.processes.values()} == {revision}, 20)
        answered: dict[str, set[str]] = {name: set() for name in names}

        def call(name: str) -> None:
            answer = client.post(f"{base}/predict", content=b"x", headers={"x-api-key": name})
            assert answer.status_code == 200, answer.text
            answered[name].add(answer.json()["model"]["version"])

        # With 32 connections a caller's second call may reach the other worker. All are kept open, because httpx
        # sometimes closes a surplus connection that another thread has just begun to use.
        limits = httpx.Limits(max_keepalive_connections=None, keepalive_expiry=None)
        with httpx.Client(limits=limits) as client, ThreadPoolExecutor(32) as pool:
            list(pool.map(call, names * 2))
        assert {len(versions) for versions in answered.values()} == {1}
        return {name for name, versions in answered.items() if versions == {"1.1.0"}}

    at_10, at_20 = sides(2, 10), sides(3, 20)
    # 99.9 % of all samples of 2,000 lie within 3.29 standard deviations.
    assert abs(len(at_10) - 200) <= 3.29 * math.sqrt(2000 * 0.1 * 0.9)
    assert abs(len(at_20) - 400) <= 3.29 * math.sqrt(2000 * 0.2 * 0.8)
    assert at_10 <= at_20


def sockets_of(pid: int) -> int:
    count = 0
    for file in files_of(pid):
        with contextlib.suppress(FileNotFoundError):
            count += str(file.readlink()).startswith("socket:")
    return count


def files_of(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def workers_of(master: int) -> set[int]:
    children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii")
    return {int(pid) for pid in children.split()}


UPGRADE = b"host: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n"


@pytest.mark.parametrize("pause_s", [0.05, 0.1])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_offers_an_upgrade_keeps_its_body(
    gateway: tuple[str, int], pause_s: float, *, chunked: bool
) -> None:
    inner = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"  # read as a request, it would be answered as one
    size = b"transfer-encoding: chunked\r\n" if chunked else b"content-length: %d\r\n" % len(inner)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner) if chunked else inner
    head = b"POST /predict?top_k=2 HTTP/1.1\r\n" + UPGRADE + size + b"\r\n"
    bare = b"GET /readyz HTTP/1.1\r\n" + UPGRADE + b"\r\n"
    last = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = say(gateway[0], head, body[:7], body[7:], bare, head + body, last, pause_s=pause_s)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b"HTTP/1.1 ") == 4
    assert answer.count(b'"class"') >= 2, "both predictions"


def test_a_pipelined_request_that_offers_an_upgrade_is_refused(gateway: tuple[str, int]) -> None:
    """Do not answer its body as a request."""
    inner = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    first = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx"
    offer = b"POST /predict HTTP/1.1\r\n" + UPGRADE + b"content-length: %d\r\n\r\n" % len(inner)
    answer = say(gateway[0], first + offer + inner)
    assert answer.count(b"HTTP/1.1 400 ") == 1
    assert answer.count(b"HTTP/1.1 200 ") <= 1


def test_a_connection_whose_short_answer_is_not_read_is_aborted() -> None:
    """Send less than uvloop buffers before it calls `pause_writing`."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"60000")]})
        await send({"type": "http.response.body", "body": b"x" * 60_000})

    class Impatient(GuardedProtocol):
        write_timeout_s = 0.2

    async def held() -> int:
        config = Config(answer, log_config=None, lifespan="off", ws="none", http=Impatient)
        config.load()
        state = ServerState()
        with socket.socket() as listener, socket.socket() as caller:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            server = await asyncio.get_running_loop().create_server(
                lambda: Impatient(config=config, server_state=state, app_state={}), sock=listener
            )
            caller.connect(listener.getsockname())
            caller.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0.1)
            assert len(state.connections) == 1
            await asyncio.sleep(1.0)
            server.close()
            return len(state.connections)

    assert uvloop.run(held()) == 0


def test_callers_who_hang_up_leave_no_traceback(start_gateway: Callable[..., tuple[str, int]], tmp_path: Path) -> None:
    base, _ = start_gateway(tmp_path, WORKERS="1")
    host, port = base.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx" * 3)
    time.sleep(0.5)
    assert httpx.get(f"{base}/livez").status_code == 200
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_key_file_that_breaks_stops_neither_a_reload_nor_a_new_worker(
    start_gateway: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    secret, key = keys.make_key("a", ["read"])
    keys.save_keys(path, [key])
    whole = path.read_text(encoding="utf-8")
    base, master = start_gateway(tmp_path, WORKERS="1", KEYS_FILE=str(path))

    def status() -> int:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{base}/models", headers={"x-api-key": secret}).status_code
        return 0

    path.write_text("{", encoding="utf-8")
    before = workers_of(master)
    os.kill(master, signal.SIGHUP)
    wait_until(lambda: "not reloaded" in (tmp_path / "log").read_text(), 10)
    assert workers_of(master) == before
    assert status() == 200, "the keys are as they were"
    os.kill(before.copy().pop(), signal.SIGKILL)
    wait_until(lambda: status() == 401, 30)  # by a worker that has never seen the keys
    path.write_text(whole, encoding="utf-8")
    wait_until(lambda: status() == 200, 10)


def test_a_clock_set_back_by_two_minutes_kills_no_worker(
    start_gateway: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nclock = time.time\ntime.time = lambda: clock() - 120 * os.path.exists({str(moved)!r})\n"
    )
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "GUNICORN_CMD_ARGS": "--timeout 2"}
    base, master = start_gateway(tmp_path, environ=environ, WORKERS="1")
    before = workers_of(master)
    moved.touch()
    time.sleep(4)
    assert workers_of(master) == before
    assert "WORKER TIMEOUT" not in (tmp_path / "log").read_text()
    assert httpx.get(f"{base}/livez").status_code == 200


def test_a_full_disk_loses_no_metrics_no_answers_and_no_workers(
    start_gateway: Callable[..., tuple[str, int]], small_disk: Path
) -> None:
    base, master = start_gateway(environ={"TMPDIR": str(small_disk)}, WORKERS="1")
    first = workers_of(master)
    assert can_predict(base)
    with contextlib.suppress(OSError), (small_disk / "log").open("wb", buffering=0) as log:
        while True:
            log.write(b"x" * 4096)

    def call_everything() -> None:
        assert can_predict(base)
        assert httpx.post(f"{base}/explain", content=b"x").status_code == 200
        assert httpx.post(f"{base}/predict/batch", files={"file": b"image-of-dog"}).status_code == 200
        assert httpx.get(f"{base}/models").status_code == 200
        assert 'route="/predict",status="200"' in httpx.get(f"{base}/metrics").text

    call_everything()
    assert workers_of(master) == first
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: bool(workers_of(master)) and not workers_of(master) & first, 20)
    wait_until(lambda: can_predict(base), 20)
    call_everything()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the mount point of a disk of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a disk that is small enough to be filled")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
