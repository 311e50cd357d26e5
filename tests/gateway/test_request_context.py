"""Facts about one request: its id, what its answer adds, and the headers made of its times and quotas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.errors import DeadlinePassed
from gateway.inference.answer import Answer
from gateway.request_context import Caller, Quota, RequestContext, new_request_id, request_id_of

if TYPE_CHECKING:
    from conftest import Stand


def test_a_sane_request_id_is_kept_and_another_replaced(stand: Stand) -> None:
    assert stand.client.get("/livez", headers={"x-request-id": "a.b:c_1"}).headers["x-request-id"] == "a.b:c_1"
    assert stand.client.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


@pytest.mark.parametrize("sent", [b"", b"a" * 129, b"a\nb", b"a\n", b'a"b', b"\xc3\xa9", b"a,b"])
def test_an_id_that_could_break_a_log_line_or_a_header_is_replaced(sent: bytes) -> None:
    replaced = request_id_of({"headers": [(b"x-request-id", sent)]})
    assert len(replaced) == 32
    assert int(replaced, 16)


def test_new_ids_differ() -> None:
    assert len({new_request_id() for _ in range(1000)}) == 1000


def test_server_timing_has_the_stages_in_their_order_in_milliseconds() -> None:
    context = RequestContext("r1")
    context.stages = {"body": 0.0015, "model": 0.25}
    *stages, total = context.server_timing().split(", ")
    assert stages == ["body;dur=1.50", "model;dur=250.00"]
    assert total.startswith("total;dur=")


def test_each_quota_is_listed_with_its_window_and_what_is_left_of_it() -> None:
    context = RequestContext("r1")
    quotas = (Quota("address", 100, 60, 97, 59), Quota("key", 600, 3600, 0, 12))
    context.caller = Caller("alice", "alice", "0123abcd", quotas)
    assert context.rate_limits() == (
        '"address";q=100;w=60, "key";q=600;w=3600',
        '"address";r=97;t=59, "key";r=0;t=12',
    )


def test_an_answer_adds_its_version_its_times_and_its_error() -> None:
    context = RequestContext("r1")
    context.stages["body"] = 0.1
    entries = ({"class": "cat", "confidence": 0.9},)
    context.note_answer(Answer("cifar10", "1.0.0", entries, timings={"wait": 0.2}, batch_id="r0"))
    assert (context.model, context.version, context.entries, context.batch_id) == ("cifar10", "1.0.0", entries, "r0")
    assert (context.stages, context.code) == ({"body": 0.1, "wait": 0.2}, "")
    context.note_answer(Answer("cifar10", "1.0.0", error=DeadlinePassed(1), is_hurried=True))
    assert (context.code, context.is_hurried) == ("deadline_passed", True)
