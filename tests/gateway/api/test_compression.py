"""Long JSON answers are compressed for callers that accept gzip; all others are sent unchanged."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, NamedTuple

import pytest

from gateway.api.compression import takes_gzip

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from conftest import Stand

FILES = [("file", ("x", b"image-of-dog"))]
CLASSES = [f"class-{number}" for number in range(20_000)]  # longer than what is compressed at once


class Sent(NamedTuple):
    """An answer with the body as it was sent; httpx's own `content` is decompressed."""

    status_code: int
    headers: httpx.Headers
    content: bytes


def sent(stand: Stand, method: str, path: str, accepted: str, **what: object) -> Sent:
    async def ask() -> Sent:
        async with stand.client.http.stream(method, path, headers={"accept-encoding": accepted}, **what) as answer:
            content = b"".join([chunk async for chunk in answer.aiter_raw()])
            return Sent(answer.status_code, answer.headers, content)

    answer: Sent = stand.client.portal.call(ask)
    assert int(answer.headers["content-length"]) == len(answer.content)
    return answer


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/predict/batch", {"files": FILES * 20}),
        ("GET", "/openapi.json", {}),
        ("GET", "/models", {}),
        ("GET", "/metrics", {}),
    ],
)
def test_a_long_answer_is_compressed_if_the_caller_accepts_gzip(
    make_stand: Callable[..., Stand], make_agent: Callable[..., object], make_version: Callable[..., dict[str, object]],
    method: str, path: str, what: dict[str, object],
) -> None:  # fmt: skip
    contract = make_version()["contract"] | {"classes": CLASSES}
    stand = make_stand(agent=make_agent(versions=[make_version(contract=contract)]))
    plain, packed = sent(stand, method, path, "identity", **what), sent(stand, method, path, "br, gzip", **what)
    assert (plain.status_code, packed.status_code) == (200, 200)
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert "accept-encoding" in plain.headers["vary"]
    assert "accept-encoding" in packed.headers["vary"]
    assert len(packed.content) < len(plain.content) / 2
    whole = gzip.decompress(packed.content)
    if path != "/metrics":
        expected, answered = json.loads(plain.content), json.loads(whole)
        assert [{**body, "request_id": ""} for body in (expected, answered)] == [{**expected, "request_id": ""}] * 2


@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("POST", "/explain"), ("GET", "/livez")])
def test_short_answers_and_images_are_not_compressed(stand: Stand, method: str, path: str) -> None:
    answer = sent(stand, method, path, "gzip", **({"files": FILES} if method == "POST" else {}))
    assert answer.status_code == 200
    assert "content-encoding" not in answer.headers


@pytest.mark.parametrize(
    ("accepted", "is_taken"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("*;q=0", False),
        ("br", False),
        ("identity", False),
        ("", False),
    ],
)
def test_only_a_caller_that_accepts_gzip_gets_it(accepted: str, is_taken: bool) -> None:
    assert takes_gzip({"headers": [(b"accept-encoding", accepted.encode())]}) is is_taken
