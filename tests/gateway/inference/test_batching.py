"""Dynamic batching: no caller gets another's answer, whoever disconnects and whatever fails, and none waits forever."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import wire
from contracts.model import Contract, Input
from contracts.wire import Options
from gateway.errors import DeadlinePassed, EngineBroke, EngineNonsense, GatewayError, HandlerFailed
from gateway.inference.answer import Call, Progress
from gateway.inference.batching import MAX_SHARED_BYTES, STALLED_S, DynamicBatcher
from gateway.inference.replicas import Replica
from gateway.inference.routing import Target
from gateway.inference.torchserve import Deadline, TorchServe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from conftest import Run, Stand

MOST_IMAGES = 4
REPLICA = Replica("http://agent")
FATES: dict[str, type[GatewayError] | None] = {
    "answered": None,
    "failed": HandlerFailed,
    "broken": EngineBroke,
    "one entry short": EngineNonsense,
    "never answered": DeadlinePassed,
}


@dataclass
class Upstream:
    """A TorchServe that answers one upstream batch after the other by `fates` (how, and after how many seconds)."""

    fates: list[tuple[str, float]] = field(default_factory=list)
    rows: list[tuple[str, wire.Options, list[bytes]]] = field(default_factory=list)
    sent_at: list[float] = field(default_factory=list)

    def shared(self, processes: int = 1) -> DynamicBatcher:
        return DynamicBatcher(TorchServe(httpx.MockTransport(self)), MOST_IMAGES, processes)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        options = wire.parse_options(request.headers[wire.OPTIONS_HEADER])
        images = [bytes(image) for image in wire.parse_body(request.headers["content-type"], request.content)]
        fate, seconds = self.fates[len(self.rows)] if len(self.rows) < len(self.fates) else ("answered", 0.01)
        self.rows.append((request.url.path, options, images))
        self.sent_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(1e6 if fate == "never answered" else seconds)
        if fate == "failed":
            return httpx.Response(503, json={"type": "InternalServerException"})
        if fate == "broken":
            raise httpx.ReadError("gone")
        each = options.images or (wire.PREDICT,) * len(images)
        assert len(request.headers[wire.OPTIONS_HEADER]) <= wire.MAX_OPTIONS_BYTES
        assert options.format == "json" or not options.images, "or a lone explanation would be answered by a PNG"
        entries = [entry_of(image, options.top_k, asked) for image, asked in zip(images, each, strict=True)]
        return httpx.Response(200, json={"results": entries[1:] if fate == "one entry short" else entries})


def entry_of(image: bytes, top_k: int, asked: wire.ImageOptions = wire.PREDICT) -> dict[str, Any]:
    name = image.decode()
    if name.startswith("bad"):
        return {"error": {"code": "image_unreadable", "detail": name}}
    if asked.explain:
        return {"class": name, "confidence": 0.9, "asked": list(asked)}
    return {"class": name, "confidence": 0.9, "top": [{"class": name, "confidence": 0.9}] * top_k}


def target(version: str = "1.0.0", workers: int = 2, side: int = 32) -> Target:
    size = Input(side, side, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    contract = Contract("cifar10", version, ("cat", "dog", "frog"), size, "resnet18_small", schema=3)
    return Target(REPLICA, "http://torchserve", "cifar10", version, workers, contract=contract)


def predict(
    shared: DynamicBatcher,
    image: bytes,
    *,
    top_k: int = 1,
    timeout_s: float = 10.0,
    to: Target | None = None,
    options: wire.ImageOptions = wire.PREDICT,
) -> Coroutine[Any, Any, dict[str, Any]]:
    call = Call(Deadline(timeout_s), Options(f"id-of-{image[:20].decode()}"))
    asked = Options(top_k=top_k, images=(options,) if options.explain else ())
    return shared.answer(to or target(), image, pixels=0, options=asked, progress=Progress(call))


@dataclass(frozen=True)
class Planned:
    """One call of a simulated hour: its time, its options, and the time at which its caller disconnects."""

    comes_at: float
    top_k: int
    version: str
    is_bad: bool
    timeout_s: float
    leaves_after: float | None
    options: wire.ImageOptions = wire.PREDICT


calls = st.builds(
    Planned,
    comes_at=st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.3]),
    top_k=st.sampled_from([1, 3]),
    version=st.sampled_from(["1.0.0", "2.0.0"]),
    is_bad=st.booleans(),
    timeout_s=st.sampled_from([0.015, 0.4, 5.0]),
    leaves_after=st.sampled_from([None, None, 0.0, 0.008, 0.35]),
    options=st.sampled_from(
        [
            wire.PREDICT,
            wire.ImageOptions(explain=True),
            wire.ImageOptions(explain=True, target=2, method="sharpcam", coverage=0.9, similar=0),
            wire.ImageOptions(explain=True, target=1, test=True),
        ]
    ),
)
fates = st.tuples(st.sampled_from([*["answered"] * 4, *FATES]), st.sampled_from([0.001, 0.01, 0.2, 0.7]))


@settings(max_examples=300, deadline=None)
@given(st.lists(calls, max_size=24), st.lists(fates, max_size=12), st.integers(1, 3))
def test_every_caller_gets_its_own_answer_or_the_error_of_its_upstream_batch(
    run: Run, planned: list[Planned], fates: list[tuple[str, float]], workers: int
) -> None:
    upstream = Upstream(fates)

    async def call(shared: DynamicBatcher, number: int, plan: Planned) -> tuple[Any, float]:
        await asyncio.sleep(plan.comes_at)
        began = asyncio.get_running_loop().time()
        to = target(plan.version, workers)
        try:
            answer: Any = await asyncio.wait_for(
                predict(
                    shared,
                    image_of(number, plan),
                    top_k=plan.top_k,
                    timeout_s=plan.timeout_s,
                    to=to,
                    options=plan.options,
                ),
                plan.leaves_after,
            )
        except (GatewayError, TimeoutError) as error:
            answer = error
        return answer, asyncio.get_running_loop().time() - began

    async def scene() -> list[tuple[Any, float]]:
        shared = upstream.shared()
        return await asyncio.gather(*(call(shared, number, plan) for number, plan in enumerate(planned)))

    answers = run(scene())
    fate_of = {}
    for row, (path, options, images) in enumerate(upstream.rows):
        fate = fates[row][0] if row < len(fates) else "answered"
        members = [(number, planned[number]) for number in map(number_of, images)]
        assert {(f"/predictions/cifar10/{plan.version}", plan.top_k) for _, plan in members} == {(path, options.top_k)}
        assert len(images) <= MOST_IMAGES
        assert options.id == f"id-of-{images[0].decode()}"
        for number, plan in members:
            assert number not in fate_of, "an image was sent twice"
            assert plan.comes_at + answers[number][1] >= upstream.sent_at[row], "its caller had left before"
            fate_of[number] = fate
    for number, (plan, (answer, took_s)) in enumerate(zip(planned, answers, strict=True)):
        image = image_of(number, plan)
        if isinstance(answer, dict):
            assert fate_of[number] == "answered"
            assert answer == entry_of(image, plan.top_k, plan.options)
        elif isinstance(answer, DeadlinePassed):
            assert f"{plan.timeout_s:g} s" in answer.detail
            assert took_s == pytest.approx(plan.timeout_s)
        elif isinstance(answer, GatewayError):
            assert type(answer) is FATES[fate_of[number]]
        else:
            assert took_s == pytest.approx(plan.leaves_after), "only who wanted to has left"
        assert took_s <= plan.timeout_s + 1e-9


def image_of(number: int, plan: Planned) -> bytes:
    return f"{'bad' if plan.is_bad else 'good'}-{number}".encode()


def number_of(image: bytes) -> int:
    return int(image.decode().rpartition("-")[2])


def images_of(upstream: Upstream) -> list[list[str]]:
    return [[image.decode()[:20] for image in images] for _, _, images in upstream.rows]


def test_images_that_arrive_while_all_upstream_batches_are_in_flight_are_sent_in_the_next(run: Run) -> None:
    upstream = Upstream([("answered", 0.1), ("answered", 0.2)])

    async def scene() -> None:
        shared = upstream.shared()
        waiting = []
        for number in range(8):
            waiting.append(asyncio.create_task(predict(shared, f"{number}".encode())))
            await asyncio.sleep(0.01)
        await asyncio.gather(*waiting)

    run(scene())
    assert images_of(upstream) == [["0"], ["1"], ["2", "3", "4", "5"], ["6", "7"]]
    assert upstream.sent_at == pytest.approx([0.0, 0.01, 0.1, 0.11], abs=1e-6)


@pytest.mark.parametrize(("workers", "processes", "rows"), [(2, 2, 1), (3, 2, 2), (1, 4, 1), (4, 1, 4)])
def test_the_gateways_processes_share_the_workers(run: Run, workers: int, processes: int, rows: int) -> None:
    upstream = Upstream([("answered", 0.1)] * rows)

    async def scene() -> None:
        shared, to = upstream.shared(processes), target(workers=workers)
        waiting = []
        for number in range(8):
            waiting.append(asyncio.create_task(predict(shared, f"{number}".encode(), to=to)))
            await asyncio.sleep(0.001)
        await asyncio.gather(*waiting)

    run(scene())
    assert [len(images) for images in images_of(upstream)[:rows]] == [1] * rows
    assert upstream.sent_at[rows] >= 0.1, "one more row than this process's share"


def test_a_single_image_is_sent_at_once_and_unchanged(run: Run) -> None:
    upstream = Upstream()
    answer = run(lone(upstream))
    assert answer["class"] == "cat"
    assert upstream.sent_at == [0.0]


async def lone(upstream: Upstream) -> dict[str, Any]:
    return await predict(upstream.shared(), b"cat")


def test_a_lost_upstream_batch_delays_other_images_only_briefly(run: Run) -> None:
    upstream = Upstream([("never answered", 0.0)])

    async def scene() -> float:
        shared = upstream.shared()
        lost = asyncio.create_task(predict(shared, b"lost", to=target(workers=1)))
        await asyncio.sleep(0.1)
        await predict(shared, b"other", to=target(workers=1))
        after = asyncio.get_running_loop().time()
        with pytest.raises(DeadlinePassed):
            await lost
        return after

    assert run(scene()) == pytest.approx(STALLED_S + 0.01)


def test_a_large_image_is_sent_alone(run: Run) -> None:
    upstream = Upstream()

    async def scene() -> None:
        shared = upstream.shared()
        images = [b"first", b"small-1", b"small-2", b"large" * (MAX_SHARED_BYTES // 5 + 1), b"small-3"]
        await asyncio.gather(*(predict(shared, image) for image in images))

    run(scene())
    assert images_of(upstream) == [["first"], ["small-1", "small-2"], ["largelargelargelarge"], ["small-3"]]


def explained_at_once(count: int, options: wire.ImageOptions, side: int = 32) -> Upstream:
    """Return the upstream after one prediction and then `count` explanations, all at once, of batches of any length."""
    upstream = Upstream()

    async def scene() -> None:
        shared = DynamicBatcher(TorchServe(httpx.MockTransport(upstream)), 1000, 1)
        to = target(workers=1, side=side)
        later = (predict(shared, f"{number}".encode(), to=to, options=options) for number in range(count))
        await asyncio.gather(predict(shared, b"first", to=to), *later)

    asyncio.run(scene())
    return upstream


def test_the_options_of_an_upstream_batch_fit_into_its_header() -> None:
    longest = wire.ImageOptions(explain=True, target=99_999, method="m" * 60, coverage=0.999, similar=10)
    batches = images_of(explained_at_once(100, longest))
    assert sum(map(len, batches)) == 101
    assert 20 < max(map(len, batches)) < 30, "the fake upstream has checked each header"


def test_the_heatmaps_of_an_upstream_batch_fit_into_its_answer() -> None:
    side = 600
    batches = images_of(explained_at_once(20, wire.ImageOptions(explain=True), side))
    assert max(map(len, batches)) * side * side * 4 / 3 < wire.MAX_ANSWER_BYTES
    assert sum(map(len, batches)) == 21


def test_an_image_whose_heatmap_is_tested_counts_as_three_in_an_upstream_batch(run: Run) -> None:
    upstream = Upstream()

    async def scene() -> None:
        shared, tested = upstream.shared(), wire.ImageOptions(explain=True, test=True)
        calls = [predict(shared, f"{number}".encode(), options=tested) for number in range(4)]
        await asyncio.gather(*calls)

    run(scene())
    assert [len(images) for images in images_of(upstream)] == [1] * 4, "a batch has room for four"


def test_an_upstream_batch_has_the_latest_deadline_of_its_calls(run: Run) -> None:
    upstream = Upstream()

    async def scene() -> int:
        shared = upstream.shared()
        longest = Deadline(9.0)
        await asyncio.gather(*(predict(shared, b"a", timeout_s=seconds) for seconds in (0.5, 1.0, 9.0, 3.0)))
        return longest.unix_ms

    longest = run(scene())
    _, (_, options, images) = upstream.rows
    assert len(images) == 3
    assert 0 <= options.deadline - longest < 500


def test_nothing_is_kept_of_calls_that_have_ended_in_any_way(run: Run) -> None:
    async def scene() -> DynamicBatcher:
        shared = Upstream([("failed", 0.01), ("never answered", 0.0)]).shared()
        calls = [predict(shared, b"a", top_k=1 + number % 3, timeout_s=1.0) for number in range(9)]
        leaves = asyncio.create_task(predict(shared, b"a"))
        await asyncio.sleep(0.001)
        leaves.cancel()
        await asyncio.gather(*calls, leaves, return_exceptions=True)
        await asyncio.sleep(10)
        return shared

    shared = run(scene())
    gc.collect()  # an exception and what it passed through hold one another
    assert not shared._queues


def test_an_exception_of_the_gateway_reaches_every_caller_in_the_upstream_batch(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> list[Any]:
        shared = Upstream().shared()
        monkeypatch.setattr(shared._upstream, "predict", lambda *_, **__: 1 / 0)
        return await asyncio.gather(*(predict(shared, b"a") for _ in range(3)), return_exceptions=True)

    assert [type(answer) for answer in run(scene())] == [ZeroDivisionError] * 3


def test_callers_of_one_upstream_batch_keep_their_ids_and_their_log_lines(
    make_stand: Callable[..., Stand], caplog: pytest.LogCaptureFixture
) -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.05)
        return stand.torchserve(request)

    stand = make_stand(upstream=slow)
    names = ["cat", "dog", "frog"]

    async def scene() -> list[httpx.Response]:
        return await asyncio.gather(
            *(
                stand.client.http.post(
                    "/predict", content=f"image-of-{name}".encode(), headers={"x-request-id": f"id-{name}"}
                )
                for name in names
            )
        )

    with caplog.at_level("INFO", logger="gateway.api.middleware"):
        answers = stand.client.portal.call(scene)
    alone, together = (wire.parse_options(call.headers["x-gradserve"]).id for call in stand.torchserve.calls)
    for name, answer in zip(names, answers, strict=True):
        assert (answer.json()["class"], answer.json()["request_id"]) == (name, f"id-{name}")
        assert answer.headers["x-request-id"] == f"id-{name}"
    rows = {record.request_id: getattr(record, "row", record.request_id) for record in caplog.records}
    assert rows == {"id-cat": alone, "id-dog": together, "id-frog": together}, (
        "the log says under which id the model knows each"
    )
