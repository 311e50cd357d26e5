"""Images of many callers at once against the real server: they share rows, and each gets the answer it gets alone."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
IMAGES = [path.read_bytes() for path in sorted((ROOT / "tests" / "samples").glob("*/*.png"))]
CLIENTS = 20  # fewer than one gateway process has places for: should all connections land on it, none is refused
ROUNDS = 10
# Between two runs of one image, whatever batch it is in: far less than between two images.
SAME = 0.002


@pytest.fixture(scope="module")
def alone(stack) -> list[dict]:
    """The answer that each image gets when nobody else asks."""
    with httpx.Client(base_url=stack.gateway, timeout=30) as client:
        answers = [client.post("/predict", params={"top_k": 10}, content=image) for image in IMAGES]
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json() for answer in answers]


def test_each_caller_of_a_crowd_gets_the_answer_to_its_own_image(stack, alone, until):
    distinct = {
        frozenset((entry["class"], round(entry["confidence"] / SAME)) for entry in answer["top"]) for answer in alone
    }
    assert len(distinct) > len(IMAGES) / 2, "the answers tell the images apart"
    log = stack.home / "logs" / "gateway.log"
    begins_at = log.stat().st_size

    async def client(http: httpx.AsyncClient, number: int) -> None:
        for turn in range(ROUNDS):
            index = (number * ROUNDS + turn) % len(IMAGES)
            top_k = (1, 3, 10)[(number + turn) % 3]
            await check(http, f"crowd-{number}-{turn}", index, top_k, is_bad=(number + turn) % 7 == 0)

    async def check(http: httpx.AsyncClient, request_id: str, index: int, top_k: int, *, is_bad: bool) -> None:
        content = IMAGES[index][:200] if is_bad else IMAGES[index]
        answer = await http.post(
            "/predict", params={"top_k": top_k}, content=content, headers={"x-request-id": request_id}
        )
        body = answer.json()
        assert answer.headers["x-request-id"] == body["request_id"] == request_id
        if is_bad:
            assert (answer.status_code, body["code"]) == (422, "image_unreadable"), body
            return
        assert answer.status_code == 200, body
        assert len(body["top"]) == top_k
        expected = {entry["class"]: entry["confidence"] for entry in alone[index]["top"]}
        assert all(abs(entry["confidence"] - expected[entry["class"]]) < SAME for entry in body["top"]), index

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=stack.gateway, timeout=30) as http:
            await asyncio.gather(*(client(http, number) for number in range(CLIENTS)))

    asyncio.run(crowd())

    def said() -> list[dict[str, str]]:
        with log.open(encoding="utf-8") as lines:
            lines.seek(begins_at)
            return [json.loads(line) for line in lines if '"crowd-' in line]

    until(lambda: len(said()) == CLIENTS * ROUNDS, 20)  # answers are sent before they are logged
    rows = Counter(line.get("row", line["request_id"]) for line in said())
    assert max(rows.values()) > 2, "the callers' images did not travel together"
