"""kill -9 of each part under load: which callers got what, that nobody got another's answer, and normal again alone."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.server, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
IMAGES = [path.read_bytes() for path in sorted((ROOT / "tests" / "samples").glob("*/[0-4].png"))]
CLIENTS = 6
# Between two runs of one image, whatever batch it is in: far less than between two images.
SAME = 0.002


@dataclass(frozen=True)
class Answer:
    """What a caller got: seconds from the load's start, 200 or status and code, and whether it was the caller's own."""

    at: float
    what: str
    is_own: bool = True


class Load:
    """Clients that ask for one image after the other, without retries, and know what each image's answer is."""

    def __init__(self, url: str, expected: list[dict[str, float]]) -> None:
        self._url = url
        self._expected = expected
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._began = time.monotonic()
        self.answers: list[Answer] = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._began

    def since(self, at: float) -> Counter:
        """What was answered since then."""
        return Counter(answer.what for answer in self.answers if answer.at >= at)

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            self.answers.append(await self._ask(client, turn % len(IMAGES), f"{number}-{turn}"))
            turn += CLIENTS
            # Refusals come at once: asking again at once would be a flood and no load.
            await asyncio.sleep(0.01 if self.answers[-1].what == "200" else 0.1)

    async def _ask(self, client: httpx.AsyncClient, index: int, request_id: str) -> Answer:
        try:
            answer = await client.post(
                self._url, params={"top_k": 10}, content=IMAGES[index], headers={"x-request-id": request_id}
            )
        except httpx.TransportError as error:
            return Answer(self.now(), f"connection lost ({type(error).__name__})")
        body = answer.json()
        is_own = body.get("request_id") == request_id
        if answer.status_code != 200:
            return Answer(self.now(), f"{answer.status_code} {body['code']}", is_own)
        return Answer(self.now(), "200", is_own and is_same(body, self._expected[index]))


def is_same(body: dict, expected: dict[str, float]) -> bool:
    """Whether the answer is that of the image whose confidences are `expected`."""
    return all(abs(entry["confidence"] - expected[entry["class"]]) < SAME for entry in body["top"])


@pytest.fixture(scope="module")
def expected(stack) -> list[dict[str, float]]:
    """Each image's confidences, from when all was well."""
    found = []
    with httpx.Client(timeout=30) as client:
        for image in IMAGES:
            answer = client.post(f"{stack.gateway}/predict", params={"top_k": 10}, content=image)
            assert answer.status_code == 200, answer.text
            found.append({entry["class"]: entry["confidence"] for entry in answer.json()["top"]})
    return found


@pytest.fixture
def kill(stack, expected, until):
    """`kill(pid, allowed, within_s)`: kills under load; what callers got from then on, until all was well again."""

    def kill(pid: int, allowed: set[str], within_s: float) -> Counter:
        with Load(f"{stack.gateway}/predict", expected) as load:
            until(lambda: load.since(0)["200"] > 50, 60, stack)
            assert set(load.since(0)) == {"200"}, load.since(0)
            killed = load.now()
            os.kill(pid, signal.SIGKILL)

            def is_well() -> bool:
                lately = load.since(load.now() - 1.0)
                return (
                    load.now() > killed + 1.5
                    and set(lately) == {"200"}
                    and lately["200"] > 20
                    and stack.health().json()["status"] == "ok"
                )

            until(is_well, within_s, stack)
            got = load.since(killed)
            last_bad = max((answer.at for answer in load.answers if answer.what != "200"), default=killed)
            print(f"{got}, the last that was not answered {last_bad - killed:.1f} s after the kill")  # noqa: T201 — for `pytest -s`
        assert not [answer for answer in load.answers if not answer.is_own], "somebody got another's answer"
        kinds = {what.split(" (")[0] for what in got}
        assert kinds <= {"200"} | allowed, got
        return got

    return kill


def workers_of_gateway(stack) -> list[int]:
    """Gunicorn's workers: the processes whose parent is its master."""
    found = {pid: command for pid, command in stack.processes().items() if "gunicorn" in command}
    return [pid for pid in found if parent_of(pid) in found]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()[1])


def test_a_gateway_worker_that_is_killed_loses_each_client_one_call_and_is_replaced(stack, kill, until):
    (worker,) = workers_of_gateway(stack)
    got = kill(worker, {"connection lost"}, 60)
    assert sum(count for what, count in got.items() if what != "200") <= CLIENTS
    until(lambda: len(workers_of_gateway(stack)) == 1 and worker not in workers_of_gateway(stack), 30)


def test_a_torchserve_worker_that_is_killed_costs_the_rows_it_had(stack, kill):
    got = kill(stack.worker_pids("cifar10")[0], {"500 handler_failed", "503 saturated"}, 120)
    assert got["200"] > 10 * (sum(got.values()) - got["200"]), "the other worker went on"


def test_torchserve_that_is_killed_is_not_ready_until_it_is_back(stack, kill):
    kill(
        stack.status()["torchserve"]["pid"],
        {"502 engine_broke", "502 engine_nonsense", "503 not_ready", "504 deadline_passed"},
        180,
    )


def test_an_agent_that_is_killed_takes_torchserve_with_it_and_both_come_back(stack, kill):
    (agent,) = [pid for pid, command in stack.processes().items() if "control.cli.main agent" in command]
    kill(agent, {"502 engine_broke", "502 engine_nonsense", "503 not_ready", "504 deadline_passed"}, 180)
