"""Load generator without retries: closed loop (a number of clients that wait for answers) and open loop (a rate).

It implements only the HTTP/1.1 that it needs, because it shares the machine with the measured server. In the open loop
requests are sent when they are due, whether or not earlier ones are answered, and each one's time counts from when it
was due, so that a server that stalls cannot hide it. A request that could not be sent, because every connection waits
for an answer, does not count as sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, cast

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

EachAnswer: TypeAlias = "Callable[[int, float, float, int, bytes], None]"
MAX_CONNECTIONS = 2000
TICK_S = 0.002  # waking up for each request would cost as much as sending it; the added delay counts in its time
MOST_AT_ONCE = 64  # requests sent before answers are read again
ANSWERS_WITHIN_S = 15.0  # after the last request was sent; the gateway's own limit is 10


@dataclass(frozen=True)
class Address:
    """Address, and whole requests (head and body) that are sent to it in turn."""

    port: int
    requests: Sequence[bytes]
    host: str = "127.0.0.1"


@dataclass
class Measurement:
    """Result of a measurement.

    `answers` has, for each request, when it was due and answered (seconds from the start) and its status (0: connection
    lost).
    """

    seconds: float
    warm_up_s: float
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    sent: int = 0
    not_sent: int = 0
    generator_cpu: float = 0.0
    """The generator's own share of one core."""

    def within(self, status: int | None = None) -> list[tuple[float, float, int]]:
        """Return the answers that came between the warm-up's end and the end, of one status or of all."""
        return [
            answer
            for answer in self.answers
            if self.warm_up_s <= answer[1] < self.seconds and status in (None, answer[2])
        ]

    def rate(self, status: int | None = 200) -> float:
        """Return the answers per second."""
        return len(self.within(status)) / (self.seconds - self.warm_up_s)

    def offered(self) -> float:
        """Return the requests per second that were really sent."""
        return self.sent / self.seconds

    def latency_ms(self, quantile: float) -> float | None:
        """Return a quantile of the milliseconds from due to answered, of answers with status 200."""
        times = sorted(answered - due for due, answered, _ in self.within(200))
        return 1000 * times[min(len(times) - 1, int(len(times) * quantile))] if times else None

    def statuses(self) -> dict[str, int]:
        """Return the number of answers of each status."""
        return {str(status): count for status, count in sorted(Counter(a[2] for a in self.answers).items())}


def closed_loop(address: Address, clients: int, seconds: float, *, warm_up_s: float = 1.0) -> Measurement:
    """Run a number of clients, each of which sends its next request when it has its answer."""
    return uvloop.run(_closed_loop(address, clients, seconds, warm_up_s))


def open_loop(
    address: Address,
    rate: float,
    seconds: float,
    *,
    warm_up_s: float = 1.0,
    each: EachAnswer | None = None,
    stop: threading.Event | None = None,
) -> Measurement:
    """Send `rate` requests per second at equal distances, whatever their answers; end early once `stop` is set.

    `each` gets every answer: the number of its request (from 0), when that was due and answered (seconds from the
    start), the status (0: connection lost) and the whole answer.
    """

    async def run() -> Measurement:
        return await _OpenLoop(address, seconds, warm_up_s, each).run(rate, stop or threading.Event())

    return uvloop.run(run())


class Connection(asyncio.Protocol):
    """Kept connection with at most one request in flight."""

    def __init__(self, on_answer: Callable[[Connection, int], None]) -> None:
        self._on_answer = on_answer
        self._buffer = b""
        self._length = -1  # of the whole answer, once its head has arrived
        self._waits = False
        self.transport: asyncio.Transport | None = None
        self.due = 0.0
        self.number = 0
        self.answer = b""  # the last one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transport is no subclass of it

    def send(self, request: bytes, due: float) -> None:
        """Send a request; `on_answer` is called in any case."""
        self.due, self._waits = due, True
        if self.transport is None or self.transport.is_closing():
            self._finish(0)
        else:
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Collect the answer until it is complete."""
        self._buffer = self._buffer + data if self._buffer else data
        if self._length < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end].lower()
            start = head.find(b"\r\ncontent-length:")
            if start < 0:
                self._finish(-1)
                return
            self._length = end + 4 + int(head[start + 17 :].split(b"\r\n", 1)[0])
        if len(self._buffer) >= self._length:
            status = int(self._buffer[9:12])
            # TorchServe answers 200 with the error in the body.
            self._finish(-1 if status == 200 and b'"class"' not in self._buffer else status)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 — asyncio's signature
        """Report a request in flight as unanswered."""
        self.transport = None
        if self._waits:
            self._finish(0)

    def close(self) -> None:
        """Close the connection."""
        self._waits = False
        if self.transport is not None:
            self.transport.close()

    def _finish(self, status: int) -> None:
        self.answer, self._buffer, self._length, self._waits = self._buffer, b"", -1, False
        self._on_answer(self, status)


async def _closed_loop(address: Address, clients: int, seconds: float, warm_up_s: float) -> Measurement:
    loop = asyncio.get_running_loop()
    measurement = Measurement(seconds, warm_up_s)
    requests, count = address.requests, len(address.requests)
    began = time.perf_counter()

    def on_answer(connection: Connection, status: int) -> None:
        now = time.perf_counter() - began
        measurement.answers.append((connection.due, now, status))
        if now < seconds and status > 0:
            ask(connection, now)

    def ask(connection: Connection, now: float) -> None:
        connection.number += 1
        measurement.sent += 1
        connection.send(requests[connection.number % count], now)

    connections = [
        (await loop.create_connection(lambda: Connection(on_answer), address.host, address.port))[1]
        for _ in range(clients)
    ]
    began, cpu = time.perf_counter(), time.process_time()
    for index, connection in enumerate(connections):
        connection.number = index * 7  # not all the same image at a time
        ask(connection, 0.0)
    await asyncio.sleep(seconds)
    measurement.generator_cpu = (time.process_time() - cpu) / seconds
    await _hang_up(connections)
    return measurement


async def _hang_up(connections: Iterable[Connection]) -> None:
    for connection in connections:
        connection.close()
    await asyncio.sleep(0.01)  # closed connections are gone after the loop's next iteration


class _OpenLoop:
    """Sender of requests when they are due, over idle or new connections."""

    def __init__(self, address: Address, seconds: float, warm_up_s: float, each: EachAnswer | None) -> None:
        self._each = each
        self.measurement = Measurement(seconds, warm_up_s)
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._everyone: set[Connection] = set()
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting = 0

    async def run(self, rate: float, stop: threading.Event) -> Measurement:
        """Send `rate` requests per second and collect the answers."""
        measurement, number, cpu = self.measurement, 0, time.process_time()
        while (now := self._now()) < measurement.seconds:
            most = number + MOST_AT_ONCE
            while (due := number / rate) <= now and number < most:
                self._ask(number, due)
                number += 1
            if stop.is_set():
                measurement.seconds = now
            await asyncio.sleep(max(TICK_S, number / rate - self._now()))
        measurement.not_sent += max(0, int(rate * measurement.seconds) - number)
        measurement.generator_cpu = (time.process_time() - cpu) / self._now()
        end = self._now() + ANSWERS_WITHIN_S
        while self._waiting and self._now() < end:  # noqa: ASYNC110 — the last answer of many has no event
            await asyncio.sleep(0.01)
        await _hang_up(self._everyone)
        return measurement

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _ask(self, number: int, due: float) -> None:
        if not self._idle and self._waiting >= MAX_CONNECTIONS:
            self.measurement.not_sent += 1
            return
        request = self._address.requests[number % len(self._address.requests)]
        self._waiting += 1
        self.measurement.sent += 1
        # The server closes connections that have been idle for some seconds.
        while self._idle and self._idle[-1].transport is None:
            self._idle.pop()
        if self._idle:
            connection = self._idle.pop()
            connection.number = number
            connection.send(request, due)
        else:
            task = self._loop.create_task(self._open_and_ask(request, due, number))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open_and_ask(self, request: bytes, due: float, number: int) -> None:
        address = self._address
        try:
            _, connection = await self._loop.create_connection(self._connection, address.host, address.port)
        except OSError:
            self._note(number, due, 0, b"")
            return
        self._everyone.add(connection)
        connection.number = number
        connection.send(request, due)

    def _connection(self) -> Connection:
        return Connection(self._take_back)

    def _take_back(self, connection: Connection, status: int) -> None:
        self._note(connection.number, connection.due, status, connection.answer)
        if status > 0 and connection.transport is not None and not connection.transport.is_closing():
            self._idle.append(connection)
        else:
            connection.close()
            self._everyone.discard(connection)

    def _note(self, number: int, due: float, status: int, answer: bytes) -> None:
        self._waiting -= 1
        self.measurement.answers.append((due, self._now(), status))
        if self._each is not None:
            self._each(number, due, self.measurement.answers[-1][1], status, answer)
