"""The load generator tells what a server did, also when that is nothing good."""

import asyncio
import threading
import time
from collections import Counter

import pytest

from benchmarks.serving.load import Address, closed_loop, open_loop

REQUEST = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n"
GOOD = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"class":"cat"}'
ERROR_IN_200 = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


@pytest.fixture
def serve():
    """`serve(answer)`: an address whose requests (a head and one byte) are answered by `answer(number) -> bytes`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = []

    def start(answer) -> Address:
        seen = Counter()

        async def talk(reader, writer):
            try:
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(1)
                    seen["requests"] += 1
                    said = await answer(seen["requests"])
                    writer.write(said[:20])
                    await writer.drain()
                    writer.write(said[20:])
                    if not said:
                        break
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(talk, "127.0.0.1", 0), loop).result()
        servers.append(server)
        return Address(server.sockets[0].getsockname()[1], [REQUEST + b"a", REQUEST + b"b"])

    yield start

    async def end():
        for server in servers:
            server.close()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))  # the generator has hung up

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def always(said, pause_s=0.0):
    async def answer(_number):
        await asyncio.sleep(pause_s)
        return said

    return answer


def test_closed_loop_counts_the_answers_of_so_many_clients(serve):
    measured = closed_loop(serve(always(GOOD, 0.05)), 4, 0.6, warm_up_s=0.1)
    assert 0 < measured.rate() <= 4 / 0.05
    assert measured.latency_ms(0.5) >= 50
    assert set(measured.statuses()) == {"200"}


def test_open_loop_offers_its_rate_and_counts_from_when_a_request_was_due(serve):
    async def stall_once(number):
        if number == 1:
            time.sleep(0.3)  # noqa: ASYNC251 — the whole server stands still
        return GOOD

    measured = open_loop(serve(stall_once), 100, 1.0, warm_up_s=0.0)
    assert measured.sent + measured.not_sent == 100
    assert measured.statuses() == {"200": measured.sent}
    waited = [answered - due for due, answered, _ in measured.answers]
    assert sum(pause > 0.1 for pause in waited) > 10, "those who were due while it stood still have waited too"


@pytest.mark.parametrize(("said", "status"), [(BUSY, "503"), (ERROR_IN_200, "-1"), (b"", "0")])
def test_what_is_no_answer_is_not_counted_as_one(serve, said, status):
    measured = open_loop(serve(always(said)), 50, 0.4, warm_up_s=0.0)
    assert set(measured.statuses()) == {status}
    assert measured.rate() == 0
    assert measured.latency_ms(0.99) is None
