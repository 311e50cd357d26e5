"""For any bytes on a connection: no answer is a 500, the worker keeps running, and its memory does not grow."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PATHS = (b"/predict", b"/predict/batch", b"/explain", b"/v2/models/cifar10/infer", b"/livez", b"/%00", b"/\xff", b"*")
# More than allocators keep without a leak; if every request leaked, the sum would be far higher.
GROWTH_MB = 30


@pytest.fixture(scope="module")
def gateway(start_gateway: Callable[..., tuple[str, int]]) -> tuple[str, int]:
    """Return the address and the worker's pid of a gateway with one worker and short timeouts."""
    base, master = start_gateway(WORKERS="1", HEADER_TIMEOUT_S="0.3", BODY_TIMEOUT_S="0.3", LOG_LEVEL="error")
    return base, worker_of(master)


def worker_of(master: int) -> int:
    return int(Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii").split()[0])


def multipart(rng: random.Random) -> tuple[bytes, bytes]:
    """Return a form's media type and body; its boundaries, headers or end may be wrong."""
    boundary = rng.choice([b"xx", b"-" * 70, b"x" * 71, b"", b'"', b"x y"])
    inside = rng.choice([boundary, boundary, b"other", boundary + b"z"])
    name = rng.choice([b'name="file"', b'name="image"', b"", b"name=file; filename=" + b"a" * 2000])
    part = (
        b"\r\ncontent-disposition: form-data; " + name + b"\r\n" * rng.randint(0, 3) + rng.randbytes(rng.randint(0, 99))
    )
    parts = (b"--" + inside + part + rng.choice([b"\r\n", b"\n", b""])) * rng.choice([0, 1, 2, 300])
    return b"multipart/form-data; boundary=" + boundary, parts + rng.choice([b"--" + inside + b"--\r\n", b"--", b""])


def chunked(rng: random.Random, body: bytes) -> bytes:
    """Return a body in chunks; some have a wrong length or no end."""
    size = rng.choice(
        [f"{len(body):x}", "fffffffffffffffff", "-1", "0x5", "g", "", f"{len(body) + 5:x}", "1;a=" + "b" * 50]
    )
    end = rng.choice([b"\r\n0\r\n\r\n", b"\r\n0\r\nx: y\r\n\r\n", b"\r\n", b"", b"\r\n0" * 9])
    return size.encode() + rng.choice([b"\r\n", b"\n", b"\r\n\r\n"]) + body + end


def headers(rng: random.Random) -> bytes:
    """Return header lines that have broken other servers."""
    lines = [
        b"host: x",
        b"accept: application/json",
        b"a: " + b"b" * rng.choice([10, 20_000, 100_000]),
        b"\x00: \x00",
        b" folded",
        b"no colon",
        b"content-length: 5",
        b"content-length: -5",
        b"content-length: 99999999999999999999",
        b"transfer-encoding: chunked, identity",
        b"expect: 100-continue",
        b"upgrade: websocket\r\nconnection: upgrade",
        b"x-timeout-ms: " + rng.choice([b"0", b"50", b"-1", b"\xb2"]),
        b"x-request-id: " + rng.randbytes(20).hex().encode() * rng.randint(0, 9),
        b"traceparent: 00-" + b"f" * 32,
        b"authorization: Bearer \xff",
    ]
    return b"".join(line + b"\r\n" for line in rng.sample(lines, rng.randint(0, 4)))


def nonsense(rng: random.Random) -> bytes:
    """Return the bytes for one connection: a broken request, or no request at all."""
    if rng.random() < 0.1:
        return rng.choice([rng.randbytes(rng.randint(0, 3000)), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n"])
    media_type, body = multipart(rng) if rng.random() < 0.5 else (b"image/png", rng.randbytes(rng.randint(0, 4000)))
    method = rng.choice([b"POST"] * 6 + [b"GET", b"PUT", b"\x00", b"CONNECT"])
    line = method + b" " + rng.choice(PATHS) + rng.choice([b"", b"?top_k=0", b"?" + b"a=b&" * 50]) + b" HTTP/1.1\r\n"
    head = line + b"content-type: " + media_type + b"\r\n" + headers(rng)
    if rng.random() < 0.4:
        request = head + b"transfer-encoding: chunked\r\n\r\n" + chunked(rng, body)
    else:
        length = len(body) + rng.choice([0, 0, 0, 7, 100_000, -3])
        request = head + f"content-length: {length}\r\n\r\n".encode() + body
    request *= rng.choice([1, 1, 1, 2, 5])
    return request[: rng.randint(0, len(request))] if rng.random() < 0.2 else request


def send(base: str, said: bytes, *, half_close: bool) -> bytes:
    """Return the bytes that come back until the connection is closed."""
    host, port = base.removeprefix("http://").split(":")
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as connection:
        for start in range(0, len(said), 8192):
            connection.sendall(said[start : start + 8192])
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        connection.settimeout(2)  # a kept connection is not closed: what came in this time is all
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * 4096 / 1e6


def fuzz(gateway: tuple[str, int], seeds: range) -> None:
    base, worker = gateway

    def one(seed: int) -> None:
        rng = random.Random(seed)
        answer = send(base, nonsense(rng), half_close=rng.random() < 0.8)
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
        assert not {500, 502} & set(statuses), (seed, answer[:2000])
        assert b"Traceback" not in answer, seed
        assert not answer or answer.startswith(b"HTTP/1.1 "), (seed, answer[:200])

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, seeds))
        time.sleep(0.5)
        before = resident_mb(worker)
        list(threads.map(one, seeds))
        time.sleep(0.5)
    assert httpx.post(f"{base}/predict", content=b"image-of-dog").json()["class"] == "dog"
    assert httpx.get(f"{base}/livez").status_code == 200
    assert resident_mb(worker) - before < GROWTH_MB


def test_hundreds_of_broken_connections_leave_it_serving(gateway: tuple[str, int]) -> None:
    fuzz(gateway, range(150))


@pytest.mark.long
def test_thousands_of_broken_connections_leave_it_serving(gateway: tuple[str, int]) -> None:
    fuzz(gateway, range(1000, 4000))
