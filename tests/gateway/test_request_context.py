"""Facts about one request: its id, and the headers made of its times and quotas."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Stand


def test_a_sane_request_id_is_kept_and_another_replaced(stand: Stand) -> None:
    assert stand.client.get("/livez", headers={"x-request-id": "a.b:c_1"}).headers["x-request-id"] == "a.b:c_1"
    assert stand.client.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
